"""Pictures as files hold them to pictures as networks see them."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import DataError
from ldm.pictures import rgb


def decode(data: bytes, enough: tuple[int, int] | None = None) -> Image.Image:
    """An encoded picture as 8-bit RGB: turned as its EXIF says, 16 bits scaled to 8, transparency laid on
    white.

    Args:
        data: bytes of any format that Pillow reads.
        enough: height and width that suffice; a JPEG may then be decoded at a half, quarter or eighth of its
            size.

    Raises:
        DataError: the bytes are no picture, or end early; the message is a clause without the sample's name.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        if enough is not None:
            picture.draft("RGB", (max(enough), max(enough)))  # both sides: EXIF may swap them
        picture = ImageOps.exif_transpose(picture)
        return rgb(picture)
    except Exception as error:  # Pillow's plugins raise all sorts of errors over a broken file
        raise DataError(f"cannot be read as a picture ({error})") from None


@dataclass(frozen=True)
class Fit:
    """Scales a picture so that it covers ``height`` × ``width`` and cuts off what sticks out.

    Cut and scaling are one resampling of the wanted part, so neither side is rounded; Lanczos, which averages
    over the source pixels when scaling down.
    """

    height: int
    width: int

    def __call__(self, picture: Image.Image, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """RGB picture to uint8 ``[height width 3]``; ``y``, ``x`` in [0, 1] place the cut, 0.5 being the
        centre.
        """
        scale = min(picture.height / self.height, picture.width / self.width)
        height, width = scale * self.height, scale * self.width
        top, left = y * (picture.height - height), x * (picture.width - width)
        box = (left, top, min(left + width, picture.width), min(top + height, picture.height))
        return np.array(picture.resize((self.width, self.height), Image.Resampling.LANCZOS, box))


def shrink(picture: Image.Image, longest: int) -> Image.Image:
    """The picture with its longer side at most ``longest`` pixels, by Lanczos; unchanged if it is."""
    scale = longest / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, math.floor(side * scale + 0.5)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 ``[b h w c]`` to fp32 ``[b c h w]`` in [-1, 1], channels_last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
