"""Boxes: rectangles with a class each, which locate the objects of an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ldm.errors import DataError, SamplingError
from ldm.modalities.base import Modality, register
from ldm.modalities.crop import Crop

Box = tuple[int, float, float, float, float]
"""Class number, left, top, right and bottom, as fractions of the image's width and height."""


class Boxes(Modality):
    """The boxes of an image: stored as JSON, in batches a list of ``b`` lists of :data:`Box`."""

    def decode(self, data: bytes) -> list[Box]:
        try:
            return read_boxes(json.loads(data))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"are not valid JSON ({error})") from None

    def encode(self, value: Sequence[Box]) -> bytes:
        return json.dumps(value).encode()

    def entry(self, value: Any) -> list[Box]:
        try:
            return read_boxes(value)
        except DataError as error:
            raise SamplingError(f"the boxes {error}.") from None

    def crop(self, value: Sequence[Box], crop: Crop) -> list[Box]:
        """Return the boxes relative to the cropped image, without those outside of it."""
        width, height = crop.original_size
        left, top, right, bottom = crop.window

        def across(fraction: float) -> float:
            return min(max((fraction * width - left) / (right - left), 0.0), 1.0)

        def down(fraction: float) -> float:
            return min(max((fraction * height - top) / (bottom - top), 0.0), 1.0)

        cut = [(label, across(x0), down(y0), across(x1), down(y1)) for label, x0, y0, x1, y1 in value]
        kept = [box for box in cut if box[1] < box[3] and box[2] < box[4]]
        return [(label, 1 - x1, y0, 1 - x0, y1) for label, x0, y0, x1, y1 in kept] if crop.flip else kept


def read_boxes(values: Any) -> list[Box]:
    """Convert any sequence of sequences of five numbers to boxes.

    Raises:
        DataError: an item is not a box; the message is a clause without a subject.
    """
    boxes = []
    try:
        for value in values:
            label, x0, y0, x1, y1 = (float(number) for number in value)
            if not (label.is_integer() and label >= 0 and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                raise ValueError
            boxes.append((int(label), x0, y0, x1, y1))
    except (TypeError, ValueError):
        expected = "a list of (class, x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
        place = f" at number {len(boxes)}" if boxes else ""
        raise DataError(f"are not {expected}{place}") from None
    return boxes


BOXES = register(Boxes("boxes", "boxes", "boxes", suffix="boxes.json", spatial=True, ndim=2))
