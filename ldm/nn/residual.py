"""Residual block and upsampling, shared by the autoencoder and the U-Net."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.gradient_checkpointing import CheckpointedBlock
from ldm.nn.group_norm import GroupNorm


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
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.embedding = nn.Linear(embedding_width, width) if embedding_width else None
        self.norm2 = GroupNorm(groups, width, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """``x [b c h w], embedding [b e]`` (already through SiLU) ``-> [b width h w]``"""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.embedding is not None:
            h = h + self.embedding(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Upsample(nn.Module):
    """Nearest neighbour, then a 3 x 3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``[b c h w] -> [b c 2h 2w]``, or to ``size`` where downsampling has rounded an odd size up."""
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
