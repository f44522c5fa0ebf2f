"""Winograd's minimal filtering F(4, 3) along the rows (Lavin & Gray 2015, arXiv 1509.09308, section 4), in fp32 on a CPU.

Four rows of the result are computed from a tile of six rows d of the input and the three rows g of the kernel:

    y = A^T [(G g) * (B^T d)]

with 6 products instead of 12. Here a product is the convolution of a row with a row of the kernel, so that half of the
operations remain. B and A add, subtract and scale: in fp32 the rounding error is two to three times that of the direct
convolution, 2e-6 of the result's deviation at 512 channels. In bf16, where the transformed rows would be rounded, it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.inference import is_eager_cpu_inference

G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

VALUES = 2**19
"""Values of each of the six transformed rows of the tiles that are computed together: enough for efficient convolutions, few
enough to stay in the cache."""


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution that keeps the size: ``[b c h w] -> [b d h w]``; by :func:`winograd` where that is faster."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_eager_cpu_inference(input) and _pays(input, weight):
            return winograd(input, weight, bias)
        return super()._conv_forward(input, weight, bias)


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Return True if the products cost much more than transforming the rows (c + d) and the kernel (one over positions).

    The choice does not depend on the number of images, so that the bits of an image do not either.
    """
    (h, w), (d, c) = x.shape[-2:], weight.shape[:2]
    return x.dtype == weight.dtype == torch.float32 and h % 4 == 0 and h * w >= 1024 and c * d >= 64 * (c + d)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``x [b c h w]`` with ``weight [d c 3 3]``, padded by one: ``[b d h w]`` in channels_last; h is a multiple of 4."""
    b, c, h, w = x.shape
    d, tiles = weight.shape[0], h // 4
    kernels = torch.tensordot(x.new_tensor(G), weight.permute(2, 0, 3, 1), dims=1)[:, :, None]  # 6 d 1 3 c
    result = torch.empty((b, d, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    step = min(max(1, VALUES // (w * c)), tiles)
    transformed, scratch = x.new_empty(6, step, w, c), x.new_empty(2, step, w, c)
    for image, out in zip(x.permute(0, 2, 3, 1), result.permute(0, 2, 3, 1), strict=True):
        for first in range(0, tiles, step):
            n = min(step, tiles - first)
            top, bottom = 4 * first - 1, 4 * (first + n) + 1
            part = image[max(top, 0) : min(bottom, h)]
            if len(part) < 4 * n + 2:
                part = F.pad(part, (0, 0, 0, 0, max(-top, 0), max(bottom - h, 0)))
            rows = [part[i : i + 4 * n - 3 : 4] for i in range(6)]
            _transform(rows, out=transformed[:, :n], scratch=scratch[:, :n])
            products = [
                # the second product has the weight 1 in all four rows of the result
                F.conv2d(v[None].permute(0, 3, 1, 2), g.permute(0, 3, 1, 2), bias if i == 1 else None, padding=(0, 1))
                for i, (v, g) in enumerate(zip(transformed[:, :n], kernels, strict=True))
            ]
            y = out[4 * first : 4 * (first + n)].view(n, 4, w, d)
            _combine([m[0].permute(1, 2, 0) for m in products], out=y.transpose(0, 1))
    return result


def _transform(d: Sequence[Tensor], out: Tensor, scratch: Tensor) -> None:
    """Multiply by B^T: six tensors ``[n w c]`` into ``out [6 n w c]``, with ``scratch [2 n w c]``."""
    even, odd = scratch
    torch.add(d[4], d[2], alpha=-5, out=out[0]).add_(d[0], alpha=4)
    torch.add(d[5], d[3], alpha=-5, out=out[5]).add_(d[1], alpha=4)
    torch.add(d[4], d[2], alpha=-4, out=even)
    torch.add(d[3], d[1], alpha=-4, out=odd)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.add(even, odd, alpha=-2, out=out[4])


def _combine(m: Sequence[Tensor], out: Tensor) -> None:
    """Multiply by A^T: six products ``[n w d]``, whose contents are lost, into ``out [4 n w d]``."""
    even, odd = m[1] + m[2], m[1].sub_(m[2])
    even2, odd2 = torch.add(m[3], m[4], out=m[2]), m[3].sub_(m[4])
    torch.add(even, even2, out=out[0]).add_(m[0])
    torch.add(odd, odd2, alpha=2, out=out[1])
    torch.add(even, even2, alpha=4, out=out[2])
    torch.add(odd, odd2, alpha=8, out=out[3]).add_(m[5])
