"""Transformer blocks over the positions of a feature map (Rombach et al. 2022, arXiv 2112.10752, appendix E.2.1)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from ldm.nn.attention import AttentionOptions, TransformerBlock
from ldm.nn.conditioning import Conditioning
from ldm.nn.group_norm import GroupNorm


class SpatialTransformer(nn.Module):
    """Group norm, projection, ``depth`` transformer blocks over the ``h w`` positions, projection back, residual.

    Args:
        width: channels of the feature map.
        depth: number of transformer blocks.
        heads: number of heads; must divide ``width``.
        context_width: channels of ``Conditioning.context``; None = no cross-attention.
        linear: True for projections as linear layers on the positions (SD 2, SDXL), False for 1 x 1 convolutions (SD 1).
        groups: groups of the group norm.
        dropout: dropout rate in the feed-forward layers.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        context_width: int | None,
        linear: bool,
        groups: int,
        dropout: float,
    ):
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, context_width, dropout) for _ in range(depth))
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, cond: Conditioning, options: AttentionOptions | None = None) -> Tensor:
        """``x [b c h w] -> [b c h w]``"""
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = rearrange(h, "b c h w -> b (h w) c")  # a view, for a channels_last tensor
        h = self.proj_in(h) if self.linear else h
        for block in self.blocks:
            h = block(h, cond, options)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
        return x + (h if self.linear else self.proj_out(h))
