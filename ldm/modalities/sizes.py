"""Sizes of images: those of the original, of the crop and of the result (Podell et al. 2023, SDXL, arXiv 2307.01952)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Integral
from typing import Any

from ldm.errors import SamplingError
from ldm.modalities.base import Modality, register
from ldm.modalities.crop import Crop

Pair = tuple[int, int]
"""Height and width, or top and left, in pixels."""


class Size(Modality):
    """A :data:`Pair` for each image, in batches a list of ``b``."""

    def split(self, value: Any) -> list[Any]:
        values = super().split(value)
        return [values] if values and all(isinstance(each, Integral) for each in values) else values

    def entry(self, value: Any) -> Pair:
        try:
            first, second = (operator.index(number) for number in value)
            if min(first, second) < 0:
                raise ValueError
        except (TypeError, ValueError):
            raise SamplingError(
                f"{self.key} has {value!r}; give a pair of non-negative integers, such as (512, 512)."
            ) from None
        return first, second


def _size(key: str, noun: str, from_crop: Callable[[Crop], Pair] | None = None) -> Size:
    return register(Size(key, noun, f"{noun}s", ndim=1, from_crop=from_crop))


SIZES = tuple(
    size.key
    for size in (
        _size("original_size", "original size", lambda crop: (crop.original_size[1], crop.original_size[0])),
        _size("crops_coords_top_left", "crop position", lambda crop: crop.top_left),
        _size("target_size", "target size"),
    )
)
"""Keys of the sizes, named as in diffusers, in the order in which SDXL embeds them."""
