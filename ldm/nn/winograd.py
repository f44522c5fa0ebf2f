"""Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin & Gray 2015, arXiv 1509.09308, section 4.1), in fp32 on a CPU.

An output of 2 x 2 is computed from a tile of 4 x 4 of the input:

    y = A^T [(G g G^T) * (B^T d B)] A

with 16 multiplications a channel instead of 36. Summed over the channels, they are 16 matrix products. B and A only add and
subtract, so that in fp32 the rounding error is less than twice that of the direct convolution. In bf16, where the transformed
tiles would be rounded too, it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.inference import is_eager_cpu_inference

TILES = 512
"""Tiles that are transformed together: enough for efficient matrix products, few enough to stay in the cache."""


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution that keeps the size: ``[b c h w] -> [b d h w]``; by :func:`winograd` where that is faster."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_eager_cpu_inference(input) and _pays(input, weight):
            return winograd(input, weight, bias)
        return super()._conv_forward(input, weight, bias)


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Return True if the products cost much more than transforming the tiles (c + d) and the weight (one over positions).

    The choice does not depend on the number of images, so that the bits of an image do not either.
    """
    (h, w), (d, c) = x.shape[-2:], weight.shape[:2]
    even = h % 2 == w % 2 == 0
    return x.dtype == weight.dtype == torch.float32 and even and c * d >= 160 * (c + d) and h * w >= 4096


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``x [b c h w]`` with ``weight [d c 3 3]``, padded by one: ``[b d h w]`` in channels_last; h and w are even."""
    b, c, h, w = x.shape
    d, columns = weight.shape[0], w // 2
    kernels = _transform(_transform(weight.permute(3, 2, 1, 0)).transpose(0, 1)).flatten(0, 1)  # G g G^T, [16 c d]
    result = torch.empty((b, d, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    step = min(max(1, TILES // columns), h // 2)  # rows of tiles at once
    rows, tiles = x.new_empty(4, step, w + 2, c), x.new_empty(4, 4, step, columns, c)
    products, sums = x.new_empty(16, step * columns, d), x.new_empty(2, 4, step, columns, d)
    for image, out in zip(x.permute(0, 2, 3, 1), result.permute(0, 2, 3, 1), strict=True):
        for top in range(0, h, 2 * step):
            n = min(step, (h - top) // 2)
            first, last = max(top - 1, 0), min(top + 2 * n + 1, h)
            part = F.pad(image[first:last], (0, 0, 1, 1, first - top + 1, top + 2 * n + 1 - last))  # 2n + 2, w + 2, c
            _subtract([part[i : i + 2 * n - 1 : 2] for i in range(4)], out=rows[:, :n])  # B^T d
            across = [rows[:, :n, i : i + w - 1 : 2] for i in range(4)]
            _subtract(across, out=tiles[:, :, :n].transpose(0, 1))  # (B^T d) B
            product = products[:, : n * columns]
            torch.bmm(tiles[:, :, :n].reshape(16, n * columns, c), kernels, out=product)
            _add(product.view(4, 4, n, columns, d), out=sums[:, :, :n])  # A^T m
            y = out[top : top + 2 * n].view(n, 2, columns, 2, d).permute(3, 1, 0, 2, 4)
            _add(sums[:, :, :n].transpose(0, 1), out=y)  # (A^T m) A
            if bias is not None:
                y += bias
    return result


def _transform(g: Tensor) -> Tensor:
    """Multiply by G along the first dimension: ``[3 ...] -> [4 ...]``."""
    first, middle, last = g.unbind()
    half, outer = middle / 2, (first + last) / 2
    return torch.stack([first, outer + half, outer - half, last])


def _subtract(d: Sequence[Tensor], out: Tensor) -> None:
    """Multiply by B^T: four tensors ``[...]`` into ``out [4 ...]``."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _add(m: Tensor, out: Tensor) -> None:
    """Multiply by A^T along the first dimension: ``[4 ...]`` into ``out [2 ...]``."""
    torch.add(m[1], m[2], out=out[0]).add_(m[0])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
