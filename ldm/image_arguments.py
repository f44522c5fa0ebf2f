"""Images and masks that a caller gives, as tensors of a range that is checked.

They are PIL images, files (names, contents or open files), arrays or tensors.

Arrays are ``[h w]`` or ``[h w c]``, tensors ``[h w]`` or ``[c h w]``, of 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels.
The dtype gives the range: uint8 is [0, 255], uint16 is [0, 65535], and bool and floats are [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checks import is_ordered
from ldm.errors import DataError, SamplingError
from ldm.image_io import ImageFile, is_file, open_argument, rgb, to_tensor

ImageSource = Image.Image | ImageFile | np.ndarray | Tensor

LUMINANCE = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601), as in Pillow."""


def listed_images(value: ImageSource | Iterable[ImageSource]) -> list[ImageSource]:
    """Return one or several images as a list; a batch is ``[n h w c]`` as an array and ``[n c h w]`` as a tensor."""
    is_one = isinstance(value, Image.Image) or is_file(value) or getattr(value, "ndim", None) in (0, 2, 3)
    return list(value) if is_ordered(value) and not is_one else [value]  # type: ignore[arg-type, list-item]


def read_image(image: ImageSource) -> Tensor:
    """Return an image as ``[3 h w]`` fp32 in [0, 1] on the CPU; transparency is composited onto white.

    Raises:
        SamplingError: a file that cannot be read, another type or shape, or values outside of the range.
    """
    if isinstance(image, Image.Image) or is_file(image):
        try:
            return to_tensor(rgb(open_argument(image)))
        except DataError as error:
            name = str(image) if isinstance(image, str | PathLike) else "the image"
            raise SamplingError(f"{name} {error}.") from None
    channels = _channels("an image", image)
    return _composited(channels) if len(channels) in (2, 4) else channels.expand(3, -1, -1)


def signed_image(image: ImageSource) -> Tensor:
    """Return an image as ``[3 h w]`` fp32 in [-1, 1]; as a tensor it is of this shape and range, else as in :func:`read_image`.

    Raises:
        SamplingError: as :func:`read_image`.
    """
    if not isinstance(image, Tensor):
        return 2 * read_image(image) - 1
    if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
        given = f"{list(image.shape)} of {image.dtype}"
        raise SamplingError(f"an image as a tensor is [3, h, w] in [-1, 1], not {given}.")
    least, most = (bound.item() for bound in image.detach().aminmax())
    if not -1 <= least <= most <= 1:
        raise SamplingError(
            f"an image as a tensor is [3, h, w] in [-1, 1], not from {least:g} to {most:g}; scale or clamp it."
        )
    return image.detach().float()


def read_mask(mask: ImageSource) -> Tensor:
    """Return a mask as ``[h w]`` fp32 from 0 (black) to 1 (white) on the CPU. Colours count by their luminance.

    What is transparent is black. Integers of more than 8 bits are [0, 65535], or [0, 255] if none is larger.

    Raises:
        SamplingError: as :func:`read_image`; a mask that is black only because of its range or its transparency.
    """
    if isinstance(mask, Image.Image) or is_file(mask):
        name = str(mask) if isinstance(mask, str | PathLike) else "the mask"
        try:
            return mask_of(open_argument(mask))
        except DataError as error:
            raise SamplingError(f"{name} {error}.") from None
    try:
        return _mask(_channels("a mask", mask, is_mask=True))
    except DataError as error:
        raise SamplingError(f"the mask {error}.") from None


def mask_of(image: Image.Image) -> Tensor:
    """Return the mask that an image of any mode shows, as :func:`read_mask`.

    Raises:
        DataError: its values are out of range, or it would be black; the message is a clause without the image's name.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        transparent = image.info.get("transparency")
        return _mask(torch.from_numpy(_scaled(np.where(values == transparent, 0, values), is_mask=True))[None])
    if image.mode == "1":
        return to_tensor(image.convert("L"))[0]
    if image.has_transparency_data:
        return _mask(to_tensor(image.convert("RGBA")))
    mask = image if image.mode == "L" else image.convert("RGB").convert("L")
    return torch.from_numpy(_scaled(np.array(mask), is_mask=True))


def as_tensor(name: str, value: Any) -> Tensor:
    """Return an array, a tensor or a list of either as a detached tensor of numbers.

    Raises:
        SamplingError: it is something else.
    """
    if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
        value = torch.stack(list(value)) if len({item.shape for item in value}) == 1 else None
    if isinstance(value, Tensor) and not value.is_complex() and not value.is_meta and value.layout == torch.strided:
        return value.detach().dequantize() if value.is_quantized else value.detach()
    try:
        array = np.asarray(None if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise SamplingError(f"{name} is of type {type(value).__name__}; give a tensor or an array of numbers.")
    if array.dtype.itemsize > 1:  # torch has no unsigned integers of more bits, nor floats of 128
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.promote_types(array.dtype, np.float32))
    return torch.from_numpy(np.array(array, np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")))


def _channels(noun: str, value: Any, is_mask: bool = False) -> Tensor:
    """Return an array or a tensor as ``[c h w]`` fp32 in [0, 1]."""
    if not isinstance(value, Tensor | np.ndarray):
        raise SamplingError(
            f"{noun} is a PIL.Image or the name of a file, not {type(value).__name__}; arrays and tensors are accepted, too."
        )
    numbers = as_tensor(noun, value).cpu()
    if value.ndim == 2:
        numbers = numbers[None]
    elif value.ndim == 3 and isinstance(value, np.ndarray):
        numbers = numbers.permute(2, 0, 1)
    if numbers.ndim != 3 or len(numbers) not in (1, 2, 3, 4) or not numbers.numel():
        raise SamplingError(
            f"{noun} has the shape {list(value.shape)}; give an array [h, w, c] or a tensor [c, h, w] of 1 to 4 channels."
        )
    plain = value if isinstance(value, np.ndarray) else None
    dtype = str(value.dtype).removeprefix("torch.") if plain is None else plain.dtype.newbyteorder("=").name
    array = (numbers.float() if numbers.is_floating_point() else numbers).numpy()
    try:
        return torch.from_numpy(_scaled(array, is_mask, dtype))
    except DataError as error:
        raise SamplingError(f"{noun} {error}.") from None


def _scaled(values: np.ndarray, is_mask: bool, dtype: str | None = None) -> np.ndarray:
    """Return values of the range of their dtype in [0, 1], fp32; a mask may have any integers, see :func:`read_mask`."""
    dtype = dtype or values.dtype.newbyteorder("=").name
    limit = {"bool": 1, "uint8": 255, "uint16": 65535}.get(dtype, 1 if values.dtype.kind == "f" else None)
    least, most = values.min(), values.max()
    if is_mask and values.dtype.kind in "iu":
        if dtype != "uint8":
            limit = 65535 if most > 255 else 255
        if most == 1:
            raise DataError(f"has integers from 0 to 1, though white is {limit}; give bools or floats, or scale it")
    if limit is None:
        raise DataError(f"is of {dtype}, whose range is not defined; give uint8 in [0, 255] or floats in [0, 1]")
    if not (least >= 0 and most <= limit):  # also if there are NaNs
        raise DataError(f"has values from {least:g} to {most:g} in {dtype}; scale them to [0, {limit}]")
    return np.true_divide(values, limit, dtype=np.float32, casting="unsafe")


def _mask(channels: Tensor) -> Tensor:
    """Return the luminance times the opacity of ``[c h w]`` as ``[h w]``."""
    if len(channels) in (1, 3):
        return _grey(channels)
    mask = _grey(channels[:-1]) * channels[-1]
    if channels[-1].min() < 1 and not mask.any():
        raise DataError("is black wherever it is not transparent; paint in white what it is to select")
    return mask


def _grey(channels: Tensor) -> Tensor:
    weights = torch.tensor(LUMINANCE, dtype=torch.float32, device="cpu")
    return channels[0] if len(channels) == 1 else torch.einsum("chw,c->hw", channels, weights).clamp(max=1)


def _composited(channels: Tensor) -> Tensor:
    """Composite grey or RGB with alpha, ``[2|4 h w]``, onto white: ``[3 h w]``."""
    colour, alpha = channels[:-1], channels[-1:]
    return (1 - alpha + alpha * colour).expand(3, -1, -1)
