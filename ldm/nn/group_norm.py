"""Group normalization (Wu & He 2018, arXiv 1803.08494) that is fast in channels_last training on a CPU too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldm.nn.cpu_training import trains_on_cpu

NARROW = 4
"""Channels of a group below which torch's backward pass is slower than :func:`_narrow_backward` (it is vectorized over them)."""


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``; in training on a CPU, of channels_last tensors, computed in fp32, and for narrow groups with a backward
    pass of its own.

    There the kernels of torch take up to three times as long in bf16 as in fp32. What the backward pass needs is kept in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[b c ...] -> [b c ...]``"""
        if x.ndim != 4 or not trains_on_cpu(x, self.weight) or x.is_contiguous():
            return super().forward(x)
        narrow = self.num_channels // self.num_groups < NARROW
        if narrow or (self.weight.dtype == torch.float32 and x.itemsize < torch.float32.itemsize):
            normalized: Tensor = _GroupNormInFP32.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return normalized
        return super().forward(x)


def silu(x: Tensor) -> Tensor:
    """Return the SiLU of the result of a norm, which nothing else uses: in its memory, unless gradients are recorded."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class _GroupNormInFP32(torch.autograd.Function):
    """Group norm of a channels_last tensor, which is kept in its own dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        b, c, h, w = x.shape
        weight, bias = _in_fp32(weight), _in_fp32(bias)
        y, mean, rstd = torch.native_group_norm(_in_fp32(x), weight, bias, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy, in_fp32 = _in_fp32(gradient), _in_fp32(x)
        (b, c, h, w), groups = x.shape, mean.shape[1]
        if c // groups < NARROW:
            gradients = _narrow_backward(dy, in_fp32, weight, mean, rstd)
        else:
            dy = dy.contiguous(memory_format=torch.channels_last)
            gradients = torch.ops.aten.native_group_norm_backward(
                dy, in_fp32, mean, rstd, weight, b, c, h * w, groups, [True, True, True]
            )
        dx, dweight, dbias = gradients
        return dx.to(gradient.dtype), dweight, dbias, None, None


def _narrow_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of y = a (x - mean) rstd + b, of which x is in both moments, with respect to x, a and b.

    dx = a rstd dy + p x + q, with p = rstd^3 (mean sum(a dy) - sum(a x dy)) / n and q = -p mean - rstd sum(a dy) / n, where
    the sums are over the n values of a group. The operations are vectorized over all channels of a channels_last tensor.
    """
    width = x.shape[1] // mean.shape[1]
    dy_sum, xdy_sum = dy.sum((2, 3)), (x * dy).sum((2, 3))  # b c
    of_groups = (weight * each for each in (dy_sum, xdy_sum))
    group_dy, group_xdy = (each.unflatten(1, (-1, width)).sum(2) for each in of_groups)  # b groups
    n = width * x.shape[2] * x.shape[3]
    p = (mean * group_dy - group_xdy) * rstd**3 / n
    q = -p * mean - rstd * group_dy / n
    mean, rstd, p, q = (each.repeat_interleave(width, dim=1) for each in (mean, rstd, p, q))  # b c
    dx = torch.addcmul(_per_channel(q), x, _per_channel(p)).addcmul_(dy, _per_channel(rstd * weight))
    return dx, ((xdy_sum - mean * dy_sum) * rstd).sum(0), dy_sum.sum(0)


def _per_channel(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _in_fp32(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is if it is more precise."""
    return x.float() if x.itemsize < torch.float32.itemsize else x
