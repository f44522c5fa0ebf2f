"""Conversion of images that a caller gives (files, PIL images or tensors) to one form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import DataError, SamplingError
from ldm.image_files import open_image, upright
from ldm.paths import expanded


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
    grey = Image.fromarray((values / (limit / 255)).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an 8-bit image to ``[c h w]`` fp32 in [0, 1], ``c`` 3 or 1; :meth:`ldm.image_output.Images.of` is its inverse."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).float() / 255


def open_argument(image: Image.Image | str | Path) -> Image.Image:
    """Return an image, given as such or as a file, in its own mode, rotated according to its EXIF orientation.

    Raises:
        SamplingError: the file cannot be read.
    """
    if isinstance(image, Image.Image):
        return upright(image)
    try:
        return open_image(expanded(image))
    except DataError as error:
        raise SamplingError(f"{image} {error}.") from None
