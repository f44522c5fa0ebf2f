"""Decoding of image files, and conversion to the tensors that networks take."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ldm.errors import DataError
from ldm.image_io import rgb


def decode(data: bytes, enough: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image to 8-bit RGB: rotated by its EXIF, 16 bits scaled to 8, transparency composited onto white.

    Args:
        data: bytes of any format that Pillow reads.
        enough: sufficient height and width; a JPEG may then be decoded at a half, quarter or eighth of its
            size.

    Raises:
        DataError: the bytes are not an image, or are truncated; the message is a clause without the sample's name.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if enough is not None:
            image.draft("RGB", (max(enough), max(enough)))  # both sides: EXIF may swap them
        return rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's plugins raise various errors for a broken file
        raise DataError(f"cannot be read as an image ({error})") from None


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height of an encoded image, rotated by its EXIF, without decoding it.

    Raises:
        DataError: as :func:`decode`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by 90 degrees
            return (image.height, image.width) if rotated else image.size
    except Exception as error:  # as in decode
        raise DataError(f"cannot be read as an image ({error})") from None


def shrink(image: Image.Image, longest: int) -> Image.Image:
    """Resize an image by Lanczos to a longer side of at most ``longest`` pixels; a smaller one is unchanged."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, math.floor(side * scale + 0.5)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(images: np.ndarray) -> Tensor:
    """Convert uint8 ``[b h w c]`` to fp32 ``[b c h w]`` in [-1, 1], channels_last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
