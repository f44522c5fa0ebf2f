"""Residual block and upsampling, shared by the autoencoder and the U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldm.nn.conv import Conv1x1, Conv3x3
from ldm.nn.gradient_checkpointing import CheckpointedBlock
from ldm.nn.group_norm import GroupNorm, silu
from ldm.nn.inference import is_plain, uses_amx


class ResidualBlock(CheckpointedBlock):
    """Twice norm, SiLU, 3 x 3 convolution, added to the input (Ho et al. 2020, arXiv 2006.11239, appendix B).

    Args:
        in_width: channels of the input.
        width: channels of the result; where it differs, the input passes a 1 x 1 convolution.
        embedding_width: width of an embedding (noise level) added between the convolutions; None = no embedding.
        groups: groups of the group norms.
        eps: eps of the group norms; 1e-5 in the U-Net, 1e-6 in the autoencoder.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        embedding_width: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_width, eps)
        self.conv1 = Conv3x3(in_width, width)
        self.embedding = nn.Linear(embedding_width, width) if embedding_width else None
        self.norm2 = GroupNorm(groups, width, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(width, width)
        self.shortcut = Conv1x1(in_width, width) if in_width != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """``x [b c h w], embedding [b e]`` (already through SiLU; further rows are ignored) ``-> [b width h w]``"""
        h = self.conv1(silu(self.norm1(x)))
        if self.embedding is not None:
            h = h + self.embedding(embedding)[: len(h), :, None, None]
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return self.shortcut(x) + h


class Upsample(nn.Module):
    """Nearest neighbour, then a 3 x 3 convolution.

    Args:
        width: channels of the input.
        out_width: channels of the result; None = ``width``.
    """

    def __init__(self, width: int, out_width: int | None = None):
        super().__init__()
        self.conv = Conv3x3(width, out_width or width)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``[b c h w] -> [b out_width 2h 2w]``, or to ``size`` where downsampling has rounded an odd size up."""
        doubled = (2 * x.shape[-2], 2 * x.shape[-1])
        if size in (None, doubled) and self._pays_in_phases(x):
            return upsample_conv(x, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(x, size=size or doubled, mode="nearest"))

    def _pays_in_phases(self, x: Tensor) -> bool:
        """Return True on a CPU without autocast, if the kernels, which are summed at each call, are small compared to ``x``."""
        traced = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        least = MIN_POSITIONS_AMX if uses_amx(x) else MIN_POSITIONS
        large = x.shape[-2] * x.shape[-1] >= least
        return large and x.device.type == "cpu" and not traced and is_plain(self.conv, Conv3x3)


MIN_POSITIONS = 256
"""Positions of an image from which on :func:`upsample_conv` is faster, at any number of channels.

In a batch it is faster from fewer on; the choice does not depend on the batch, so that the bits of an image do not either."""

MIN_POSITIONS_AMX = 4096
"""The same in bf16 on a CPU with AMX, where summing the kernels takes longer than the products that it saves."""


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Upsample by nearest neighbour to twice the size and convolve with a 3 x 3 kernel, with 4/9 of the operations.

    Each pixel of the result sees only 2 x 2 different values of ``x``. So each of its four phases (even and odd rows and
    columns) is a convolution of ``x`` with a 2 x 2 kernel, whose elements are sums of those of the 3 x 3 kernel.

    Args:
        x: ``[b c h w]``.
        weight: ``[d c 3 3]``.
        bias: ``[d]`` or None.

    Returns:
        ``[b d 2h 2w]`` in channels_last.
    """
    b, _, h, w = x.shape
    if torch.is_grad_enabled():
        four = [_phase(_phase(weight, 2, row), 3, column) for row in (0, 1) for column in (0, 1)]
        joined: Tensor = _Joined.apply(
            F.conv2d(x, torch.cat(four), None if bias is None else bias.repeat(4), padding=1)
        )
        return joined
    shape = (b, weight.shape[0], 2 * h, 2 * w)
    result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for row in (0, 1):
        kernels = _phase(weight, 2, row)
        for column in (0, 1):
            # the phase, with one row and one column more
            phase = F.conv2d(x, _phase(kernels, 3, column), bias, padding=1)
            result[..., row::2, column::2] = phase[..., row : row + h, column : column + w]
    return result


class _Joined(torch.autograd.Function):
    """The four phases of an image, ``[b 4d h+1 w+1] -> [b d 2h 2w]``, in channels_last; each has a row and a column too many."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        b, channels, h, w = phases.shape
        result = _empty(phases, (b, channels // 4, 2 * h - 2, 2 * w - 2))
        for ours, theirs in zip(_parts(phases), _interleaved(result), strict=True):
            theirs.copy_(ours)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        b, channels, h, w = gradient.shape
        phases = _empty(gradient, (b, 4 * channels, h // 2 + 1, w // 2 + 1)).zero_()
        for ours, theirs in zip(_parts(phases), _interleaved(gradient), strict=True):
            ours.copy_(theirs)
        return phases


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _parts(phases: Tensor) -> list[Tensor]:
    """Return the phases of even and odd rows and columns without the row and the column too many."""
    h, w = phases.shape[-2] - 1, phases.shape[-1] - 1
    return [part[..., i // 2 : i // 2 + h, i % 2 : i % 2 + w] for i, part in enumerate(phases.chunk(4, dim=1))]


def _interleaved(image: Tensor) -> list[Tensor]:
    """Return the same positions of an image."""
    return [image[..., i // 2 :: 2, i % 2 :: 2] for i in range(4)]


def _phase(kernel: Tensor, dim: int, odd: int) -> Tensor:
    """Return the kernel of two taps for the even or the odd positions, of a kernel of three taps along ``dim``."""
    before, centre, after = kernel.split(1, dim)
    return torch.cat([before + centre, after] if odd else [before, centre + after], dim)
