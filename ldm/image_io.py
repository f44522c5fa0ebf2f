"""Conversion of images that a caller gives (files, PIL images or tensors) to one form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import SamplingError
from ldm.paths import expanded


def rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB: 16 bits are scaled to 8, transparency is composited onto white."""
    if image.mode.startswith("I"):  # 16-bit greyscale: convert() would clip it at 255
        image = Image.fromarray((np.asarray(image, np.float32) / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an 8-bit image to ``[c h w]`` fp32 in [0, 1], ``c`` 3 or 1; :meth:`ldm.image_output.Images.of` is its inverse."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).float() / 255


def open_argument(image: Image.Image | str | Path) -> Image.Image:
    """Return an image, given as such or as a file, in its own mode, rotated according to its EXIF orientation.

    Raises:
        SamplingError: the file cannot be read.
    """
    if isinstance(image, str | Path):
        try:
            image = Image.open(expanded(image))
            image.load()
        except (OSError, SyntaxError) as error:
            raise SamplingError(f"{image} cannot be read as an image ({error}).") from None
    return ImageOps.exif_transpose(image)
