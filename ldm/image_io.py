"""Conversion of images that a caller gives (files, PIL images or tensors) to one form."""

from __future__ import annotations

from os import PathLike
from typing import BinaryIO, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import DataError, SamplingError
from ldm.image_files import open_image, upright
from ldm.paths import expanded

ImageFile = str | PathLike[str] | bytes | BinaryIO
"""An image file: its name, its content, or an open binary file."""


def rgb(image: Image.Image, background: str | tuple[int, ...] = "white") -> Image.Image:
    """Convert an image to 8-bit RGB: other integers from [0, 65535], floats from [0, 1], transparency composited onto a colour.

    Raises:
        DataError: values are outside of the range; the message is a clause without the image's name.
    """
    image = rgb_or_rgba(image)
    if image.mode == "RGBA":
        opaque = Image.new("RGBA", image.size, background)
        opaque.alpha_composite(image)
        image = opaque.convert("RGB")
    return image


def rgb_or_rgba(image: Image.Image) -> Image.Image:
    """Convert an image as :func:`rgb`, but to RGBA if it has transparency."""
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip at 255
        image = _eight_bits(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image of one channel of larger numbers to 8 bits; a transparent value becomes an alpha channel."""
    values, limit = np.asarray(image, np.float32), 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= limit):
        raise DataError(
            f"has values from {values.min():g} to {values.max():g} in mode {image.mode}; scale them to [0, {limit:g}], "
            "or save it with 8 bits"
        )
    if image.mode == "I" and 1 < values.max() <= 255:
        raise DataError(
            f"has values from {values.min():g} to {values.max():g} in mode I, where white is 65535; convert it to mode L"
        )
    grey = Image.fromarray((values / (limit / 255)).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an 8-bit image to ``[c h w]`` fp32 in [0, 1], ``c`` 3 or 1; :meth:`ldm.image_output.Images.of` is its inverse."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).float() / 255


def is_file(value: object) -> TypeGuard[ImageFile]:
    """Return whether a value is an image file: its name, its content, or an object that reads it."""
    return isinstance(value, str | bytes | PathLike) or hasattr(value, "read")


def open_argument(image: Image.Image | ImageFile) -> Image.Image:
    """Return an image, given as such or as a file, in its own mode, rotated according to its EXIF orientation.

    Raises:
        SamplingError: the file cannot be read.
        DataError: the image has no pixels.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise DataError("has no pixels")
        return upright(image.convert("LA") if image.mode == "La" else image)
    try:
        if isinstance(image, bytes):
            return open_image(image)
        if isinstance(image, str | PathLike):
            return open_image(expanded(image))
        if image.seekable():
            image.seek(0)  # what has just been written is read, too
        return open_image(image.read())
    except DataError as error:
        name = image if isinstance(image, str | PathLike) else "the content of the file"
        raise SamplingError(f"{name} {error}.") from None
