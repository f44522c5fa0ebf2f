"""Embeddings of the noise level."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 16
"""The rows of an embedding are padded to a multiple of this number; see :func:`pad_rows`."""


def sinusoidal(noise_level: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Compute cos and sin of ``noise_level`` at ``width / 2`` geometrically spaced frequencies (arXiv 1706.03762, section 3.5).

    Args:
        noise_level: ``[b]``, any real numbers (the timestep of SD, fractional ones too).
        width: width of the embedding; even.

    Returns:
        ``[b width]`` fp32, the cosines first.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=noise_level.device) / half
    )
    angles = noise_level.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class NoiseEmbedding(nn.Module):
    """Sinusoidal embedding of the noise level, followed by a two-layer MLP: ``[b] -> [b embedding_width]``."""

    def __init__(self, width: int, embedding_width: int):
        super().__init__()
        self.width = width
        self.mlp = mlp(width, embedding_width)

    def forward(self, noise_level: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoidal(noise_level, self.width).to(dtype))


def mlp(in_width: int, width: int) -> nn.Sequential:
    """Build the two-layer MLP that embeds a noise level or a conditioning vector: ``[b in_width] -> [b width]``."""
    return nn.Sequential(nn.Linear(in_width, width), nn.SiLU(), nn.Linear(width, width))


def pad_rows(x: Tensor) -> Tensor:
    """Pad ``x [b ...]`` with zeros to a multiple of ``ROWS`` rows.

    BLAS libraries multiply matrices of few rows (MKL: below 4 to 16, depending on the CPU) by other kernels, which round
    differently. With padded rows the embedding of an image is bitwise the same in any batch, at no cost that can be measured.
    """
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % ROWS))
