"""Transformer blocks over the positions of a feature map (Rombach et al. 2022, arXiv 2112.10752, appendix E.2.1)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from ldm.nn.attention import AttentionOptions, TransformerBlock
from ldm.nn.conditioning import Conditioning
from ldm.nn.conv import Conv1x1
from ldm.nn.group_norm import GroupNorm
from ldm.nn.inference import Linear
from ldm.nn.token_merging import TokenMerging
from ldm.nn.token_routing import route_tokens


class SpatialTransformer(nn.Module):
    """Group norm, projection, ``depth`` transformer blocks over the ``h w`` positions, projection back, residual.

    Args:
        width: channels of the feature map.
        depth: number of transformer blocks.
        heads: number of heads; must divide ``width``.
        context_width: channels of ``Conditioning.context``; None = no cross-attention.
        linear: True for projections as linear layers on the positions (SD 2, SDXL), False for 1 x 1 convolutions (SD 1).
        groups: groups of the group norm.
        merges: True if ``AttentionOptions.token_merging`` acts on its self-attentions.
        dropout: dropout rate in the feed-forward layers.

    Attributes:
        token_routing: share of the positions that skip the blocks in training mode; see :mod:`ldm.nn.token_routing`.
    """

    token_routing: float = 0.0

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        context_width: int | None,
        linear: bool,
        groups: int,
        dropout: float,
        merges: bool = False,
    ):
        super().__init__()
        self.linear = linear
        self.merges = merges
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.proj_in = Linear(width, width) if linear else Conv1x1(width, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, context_width, dropout) for _ in range(depth))
        self.proj_out = Linear(width, width) if linear else Conv1x1(width, width)

    def forward(self, x: Tensor, cond: Conditioning, options: AttentionOptions | None = None) -> Tensor:
        """``x [b c h w] -> [b c h w]``"""
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = rearrange(h, "b c h w -> b (h w) c")  # a view, for a channels_last tensor
        h = self.proj_in(h) if self.linear else h
        merging = None
        if self.merges and options is not None and options.token_merging is not None:
            merging = TokenMerging(h, (x.shape[2], x.shape[3]), options.token_merging)

        def transform(tokens: Tensor) -> Tensor:
            for block in self.blocks:
                tokens = block(tokens, cond, options, merging)
            return tokens

        routes = self.training and self.token_routing > 0
        h = route_tokens(h, self.token_routing, transform) if routes else transform(h)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
        return x + (h if self.linear else self.proj_out(h))
