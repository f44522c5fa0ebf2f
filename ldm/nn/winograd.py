"""Winograd's minimal filtering along the rows (Lavin & Gray 2015, arXiv 1509.09308, section 4), for inference on a CPU.

F(m, 3) computes m rows of the result from a tile of m + 2 rows d of the input and the three rows g of the kernel:

    y = A^T [(G g) * (B^T d)]

with m + 2 products instead of 3 m. Here a product is the convolution of a row with a row of the kernel, so that 1/2 of the
operations remain for m = 4 and 2/3 for m = 2. B and A add, subtract and scale; the greater m is, the more precision that costs:

- fp32, m = 4: the error is two to three times that of the direct convolution, 2e-6 of the result's deviation at 512 channels.
- bf16, m = 2: transformed rows and products are rounded, so that the error is 2.2 times that of the direct convolution, 3.7e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.inference import uses_amx

BYTES = 2**24
"""Bytes of the transformed rows of the tiles that are computed together: many enough for efficient convolutions, few enough to
stay in the cache."""


@dataclass(frozen=True)
class Filtering:
    """F(m, 3).

    Attributes:
        m: rows of the result that a tile gives.
        g: the matrix G ``[m+2 3]``.
        transform: multiplies m + 2 tensors by B^T: ``(d, out [m+2 ...])``.
        combine: multiplies m + 2 products, whose contents are lost, by A^T: ``(products, out [m ...])``. The weight of the second
            product is 1 in all rows, so that the bias can be added to it.
        min_width: channels c d / (c + d) from which on the products cost much more than the transforms, which cost c + d.
        min_positions: positions of an image from which on they cost much more than transforming the kernel.
    """

    m: int
    g: tuple[tuple[float, float, float], ...]
    transform: Callable[[Sequence[Tensor], Tensor], None]
    combine: Callable[[Sequence[Tensor], Tensor], None]
    min_width: int
    min_positions: int


def _transform_2(d: Sequence[Tensor], out: Tensor) -> None:
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _combine_2(m: Sequence[Tensor], out: Tensor) -> None:
    torch.add(m[1], m[2], out=out[0]).add_(m[0])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _transform_4(d: Sequence[Tensor], out: Tensor) -> None:
    torch.add(d[4], d[2], alpha=-5, out=out[0]).add_(d[0], alpha=4)
    torch.add(d[5], d[3], alpha=-5, out=out[5]).add_(d[1], alpha=4)
    even, odd = torch.add(d[4], d[2], alpha=-4), torch.add(d[3], d[1], alpha=-4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.add(even, odd, alpha=-2, out=out[4])


def _combine_4(m: Sequence[Tensor], out: Tensor) -> None:
    even, odd = m[1] + m[2], m[1].sub_(m[2])
    even2, odd2 = torch.add(m[3], m[4], out=m[2]), m[3].sub_(m[4])
    torch.add(even, even2, out=out[0]).add_(m[0])
    torch.add(odd, odd2, alpha=2, out=out[1])
    torch.add(even, even2, alpha=4, out=out[2])
    torch.add(odd, odd2, alpha=8, out=out[3]).add_(m[5])


_G_2 = ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1))
_G_4 = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
FILTERINGS = {
    torch.float32: Filtering(4, _G_4, _transform_4, _combine_4, min_width=64, min_positions=1024),
    torch.bfloat16: Filtering(2, _G_2, _transform_2, _combine_2, min_width=80, min_positions=4096),
}


def pays(x: Tensor, weight: Tensor) -> bool:
    """Return True where :func:`winograd` is faster than a convolution of stride 1.

    This does not depend on the number of images, so that the bits of one do not depend on others.
    """
    filtering = FILTERINGS.get(x.dtype)
    if filtering is None or weight.dtype != x.dtype or uses_amx(x):
        return False
    (h, w), (d, c) = x.shape[-2:], weight.shape[:2]
    return h % filtering.m == 0 and h * w >= filtering.min_positions and c * d >= filtering.min_width * (c + d)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``x [b c h w]`` with ``weight [d c 3 3]``, padded by one: ``[b d h w]`` in channels_last; h is a multiple of m."""
    filtering = FILTERINGS[x.dtype]
    m = filtering.m
    (b, c, h, w), d = x.shape, weight.shape[0]
    g = weight.permute(2, 0, 3, 1).float()
    kernels = torch.tensordot(g.new_tensor(filtering.g), g, dims=1).to(x.dtype)[:, :, None].permute(0, 1, 4, 2, 3)
    result = torch.empty((b, d, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    step = min(max(1, BYTES // ((m + 2) * w * c * x.itemsize)), h // m)  # tiles at once
    transformed = x.new_empty(m + 2, step, w, c)
    for image, out in zip(x.permute(0, 2, 3, 1), result.permute(0, 2, 3, 1), strict=True):
        for first in range(0, h, m * step):
            n = min(step, (h - first) // m)
            top, bottom = first - 1, first + m * n + 1
            part = image[max(top, 0) : min(bottom, h)]
            if len(part) < bottom - top:
                part = F.pad(part, (0, 0, 0, 0, max(-top, 0), max(bottom - h, 0)))
            rows = transformed[:, :n]
            filtering.transform([part[i : i + m * (n - 1) + 1 : m] for i in range(m + 2)], rows)
            products = [
                F.conv2d(row[None].permute(0, 3, 1, 2), kernel, bias if i == 1 else None, padding=(0, 1))
                for i, (row, kernel) in enumerate(zip(rows, kernels, strict=True))
            ]
            y = out[first : first + m * n].view(n, m, w, d).transpose(0, 1)
            filtering.combine([product[0].permute(1, 2, 0) for product in products], y)
    return result
