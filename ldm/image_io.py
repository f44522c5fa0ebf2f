"""Pictures that a caller gives, as files, PIL or tensors, brought to one form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import SamplingError


def rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB: 16 bits scaled to 8, transparency laid on white."""
    if picture.mode.startswith("I"):  # 16-bit greyscale: convert() would clip it at 255
        picture = Image.fromarray((np.asarray(picture, np.float32) / 257.0).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.new("RGBA", rgba.size, "white")
        picture.alpha_composite(rgba)
    return picture.convert("RGB")


def to_tensor(picture: Image.Image) -> Tensor:
    """8-bit image to ``[c h w]`` fp32 in [0, 1], ``c`` 3 or 1; :meth:`ldm.image_output.Images.of` gives the same bits back."""
    array = np.array(picture)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1) / 255


def read_picture(picture: Image.Image | str | Path) -> Image.Image:
    """An image or the file of one as 8-bit RGB, turned as its EXIF says.

    Raises:
        SamplingError: the file cannot be read, or the image is neither.
    """
    if isinstance(picture, str | Path):
        try:
            picture = Image.open(picture)
            picture.load()
        except (OSError, SyntaxError) as error:
            raise SamplingError(f"{picture} cannot be read as an image ({error}).") from None
    if not isinstance(picture, Image.Image):
        raise SamplingError(f"an image is a PIL.Image or the name of a file, not {type(picture).__name__}.")
    return rgb(ImageOps.exif_transpose(picture))


def signed_tensor(picture: Image.Image | str | Path | Tensor) -> Tensor:
    """An image, the file of one, or a tensor that is one already, as ``[3 h w]`` fp32 in [-1, 1].

    Raises:
        SamplingError: as :func:`read_picture`; a tensor of another shape.
    """
    if not isinstance(picture, Tensor):
        return 2 * to_tensor(read_picture(picture)) - 1
    if picture.ndim != 3 or len(picture) != 3 or not picture.is_floating_point():
        given = f"{list(picture.shape)} of {picture.dtype}"
        raise SamplingError(f"an image as a tensor is [3, h, w] in [-1, 1], not {given}.")
    return picture.float()
