"""Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762) and the transformer block of latent diffusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.conditioning import Conditioning


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with queries from ``x`` and keys and values from ``context`` (default: ``x`` itself).

    Args:
        width: of ``x`` and of the result.
        heads: number of heads; must divide ``width``.
        context_width: of ``context``; None = ``width``.
        bias: whether the projections of queries, keys and values have one (the output's always does).
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = False):
        super().__init__()
        assert width % heads == 0, f"{heads} heads do not divide the width {width}"
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """``x [b n d], context [b m e], mask [b m]`` (True = attend) ``-> [b n d]``."""
        context = x if context is None else context
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        allowed = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def identity(self, x: Tensor) -> Tensor:
        """``[b n d] -> [b n d]``: each position attends to itself alone."""
        return self.to_out(self.to_v(x))


class GEGLU(nn.Module):
    """value * gelu(gate), both linear in the input (Shazeer 2020, arXiv 2002.05202); the exact-erf gelu."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[... width] -> [... hidden]``"""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, gated feed-forward; each pre-normed and residual.

    Without ``context_width`` there is nothing to listen to and the cross-attention is left out.
    """

    def __init__(self, width: int, heads: int, context_width: int | None, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width) if context_width else None
        self.attn2 = Attention(width, heads, context_width) if context_width else None
        self.norm3 = nn.LayerNorm(width)
        self.ff = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        """``x [b n d] -> [b n d]``"""
        h = self.norm1(x)
        attended = self.attn1(h)
        if cond.perturb is not None:
            attended = torch.where(cond.perturb[:, None, None], self.attn1.identity(h), attended)
        x = x + attended
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), cond.context, cond.mask)
        return x + self.ff(self.norm3(x))
