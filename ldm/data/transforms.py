"""Pictures as files hold them to images as networks see them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ldm.conditioning.boxes import Box
from ldm.errors import DataError
from ldm.image_io import rgb


def decode(data: bytes, enough: tuple[int, int] | None = None) -> Image.Image:
    """An encoded image as 8-bit RGB: turned as its EXIF says, 16 bits scaled to 8, transparency laid on
    white.

    Args:
        data: bytes of any format that Pillow reads.
        enough: height and width that suffice; a JPEG may then be decoded at a half, quarter or eighth of its
            size.

    Raises:
        DataError: the bytes are no image, or end early; the message is a clause without the sample's name.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        if enough is not None:
            picture.draft("RGB", (max(enough), max(enough)))  # both sides: EXIF may swap them
        picture = ImageOps.exif_transpose(picture)
        return rgb(picture)
    except Exception as error:  # Pillow's plugins raise all sorts of errors over a broken file
        raise DataError(f"cannot be read as an image ({error})") from None


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, turned as its EXIF says, without decoding it.

    Raises:
        DataError: as :func:`decode`.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
            return (picture.height, picture.width) if turned else picture.size
    except Exception as error:  # as in decode
        raise DataError(f"cannot be read as an image ({error})") from None


@dataclass(frozen=True)
class Fit:
    """Scales an image so that it covers ``height`` × ``width`` and cuts off what sticks out.

    Cut and scaling are one resampling of the wanted part, so neither side is rounded; Lanczos, which averages
    over the source pixels when scaling down.
    """

    height: int
    width: int

    def __call__(self, picture: Image.Image, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """RGB image to uint8 ``[height width 3]``; ``y``, ``x`` in [0, 1] place the cut, 0.5 being the
        centre.
        """
        box = self.window(picture.width, picture.height, y, x)
        return np.array(picture.resize((self.width, self.height), Image.Resampling.LANCZOS, box))

    def window(self, width: int, height: int, y: float = 0.5, x: float = 0.5) -> tuple[float, float, float, float]:
        """The wanted part of an image of so many pixels: left, top, right, bottom."""
        scale = min(height / self.height, width / self.width)
        kept_height, kept_width = scale * self.height, scale * self.width
        top, left = y * (height - kept_height), x * (width - kept_width)
        return left, top, min(left + kept_width, width), min(top + kept_height, height)

    def place(self, size: tuple[int, int], y: float = 0.5, x: float = 0.5) -> tuple[int, int]:
        """Top and left of the cut in an image of ``size`` (width, height), in pixels of the result."""
        left, top, right, bottom = self.window(*size, y, x)
        return round(top * self.height / (bottom - top)), round(left * self.width / (right - left))

    def semantic(self, labels: Image.Image, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """A map of classes, one a pixel, cut as its image is: int64 ``[height width]``, of the nearest pixels."""
        box = self.window(labels.width, labels.height, y, x)
        return np.asarray(labels.resize((self.width, self.height), Image.Resampling.NEAREST, box)).astype(np.int64)

    def boxes(self, boxes: Sequence[Box], size: tuple[int, int], y: float = 0.5, x: float = 0.5) -> list[Box]:
        """Boxes of an image of ``size`` (width, height), as they lie in what is cut of it; those outside are left out."""
        width, height = size
        left, top, right, bottom = self.window(width, height, y, x)

        def across(share: float) -> float:
            return min(max((share * width - left) / (right - left), 0.0), 1.0)

        def down(share: float) -> float:
            return min(max((share * height - top) / (bottom - top), 0.0), 1.0)

        cut = [(label, across(x0), down(y0), across(x1), down(y1)) for label, x0, y0, x1, y1 in boxes]
        return [box for box in cut if box[1] < box[3] and box[2] < box[4]]


def shrink(picture: Image.Image, longest: int) -> Image.Image:
    """The image with its longer side at most ``longest`` pixels, by Lanczos; unchanged if it is."""
    scale = longest / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, math.floor(side * scale + 0.5)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 ``[b h w c]`` to fp32 ``[b c h w]`` in [-1, 1], channels_last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
