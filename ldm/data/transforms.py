"""Decoding of stored images, and conversion to the tensors that networks take."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ldm.data.bad_samples import Reason, SampleError
from ldm.errors import DataError
from ldm.image_files import ImageFileError, open_image
from ldm.image_io import rgb
from ldm.modalities.crop import WHITE, Color


def decode(data: bytes, enough: tuple[int, int] | None = None, background: str | Color = WHITE) -> Image.Image:
    """Decode an image to 8-bit RGB: rotated by its EXIF, more bits scaled to 8, transparency composited onto a colour.

    Args:
        data: bytes of any format that :func:`ldm.image_files.open_image` reads.
        enough: sufficient height and width; a JPEG may then be decoded at a half, quarter or eighth of its
            size.
        background: colour behind transparency, in any form that Pillow takes.

    Raises:
        SampleError: the bytes are not an image, are truncated, or hold too many pixels, which are then not allocated.
    """
    try:
        return rgb(open_image(data, enough), background)
    except DataError as error:
        raise SampleError(_reason(data, error), f"the image {error}") from None


def _reason(data: bytes, error: DataError) -> Reason:
    """Return the category of an error in decoding an image."""
    if not any(data):
        return Reason.EMPTY_IMAGE
    problem = error.problem if isinstance(error, ImageFileError) else None
    if isinstance(problem, UnidentifiedImageError):
        return Reason.UNKNOWN_FORMAT
    return Reason.TOO_MANY_PIXELS if isinstance(problem, Image.DecompressionBombError) else Reason.BROKEN_IMAGE


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
