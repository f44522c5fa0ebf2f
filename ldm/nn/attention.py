"""Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762) and the transformer block of latent diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldm.nn.conditioning import Conditioning
from ldm.nn.cpu_attention import fast_attention
from ldm.nn.cpu_training import trains_on_cpu
from ldm.nn.deep_features import DeepFeatures
from ldm.nn.gradient_checkpointing import CheckpointedBlock
from ldm.nn.inference import Linear, is_plain, onednn_linear, onednn_linear_times, uses_onednn
from ldm.nn.token_merging import TokenMerging

SHORT = 256
"""Number of keys up to which bf16 attention is computed in fp32 in training on a CPU.

Its backward pass takes up to five times as long in bf16, and with more keys about as long."""


@dataclass(frozen=True)
class AttentionOptions:
    """Changes to the evaluation of a network, above all to its attention, for one forward pass.

    Attributes:
        identity: ``[b]`` of bool, True where the self-attention in the middle of the network is replaced by the identity
            (perturbed-attention guidance, Ahn et al. 2024, arXiv 2403.17377); None = nowhere.
        token_merging: share of the positions that are merged in the largest self-attentions; see :mod:`ldm.nn.token_merging`.
        deep_features: store of the features of a U-Net's inner blocks; see :class:`ldm.nn.deep_features.DeepFeatures`.
    """

    identity: Tensor | None = None
    token_merging: float | None = None
    deep_features: DeepFeatures | None = None


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """``F.scaled_dot_product_attention``, except on a CPU: in training with few keys it is computed in fp32, and in inference by
    :func:`ldm.nn.cpu_attention.fast_attention`.

    ``q [b heads n d], k [b heads m d], v [b heads m d], mask [b 1 1 m]`` (True = attend) ``-> [b heads n d]``
    """
    if not causal and (out := fast_attention(q, k, v, mask)) is not None:
        return out
    if k.shape[2] > SHORT or v.itemsize >= torch.float32.itemsize or not trains_on_cpu(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return _AttentionInFP32.apply(q, k, v, mask, causal)


class _AttentionInFP32(torch.autograd.Function):
    """Attention in fp32 that keeps its inputs in their own dtype; the backward pass computes it again, cheap for few keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal = causal
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        return out.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        q, k, v = (each.float().requires_grad_() for each in inputs)
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=ctx.causal)
            gradients = torch.autograd.grad(out, (q, k, v), gradient.float())
        return *(each.to(own.dtype) for each, own in zip(gradients, inputs, strict=True)), None, None


class Attention(nn.Module):
    """Multi-head attention softmax(q k^T / sqrt(d)) v: queries from ``x``, keys and values from ``context`` (default: ``x``).

    Args:
        width: channels of ``x`` and of the result.
        heads: number of heads; must divide ``width``.
        context_width: channels of ``context``; None = ``width``.
        bias: True to give the projections of queries, keys and values a bias (the output's always has one).
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = False):
        super().__init__()
        assert width % heads == 0, f"{heads} heads do not divide the width {width}"
        self.heads = heads
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(context_width or width, width, bias=bias)
        self.to_v = Linear(context_width or width, width, bias=bias)
        self.to_out = Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """``x [b n d], context [b m e], mask [b m]`` (True = attend) ``-> [b n d]``"""
        context = x if context is None else context
        return self.to_out(self.attend(self.to_q(x), self.to_k(context), self.to_v(context), mask, causal))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attend with all heads: ``q [b n d], k [b m d], v [b m d], mask [b m]`` (True = attend) ``-> [b n d]``"""
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        allowed = None if mask is None else mask[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, allowed, causal).transpose(1, 2).flatten(2)

    def identity(self, x: Tensor) -> Tensor:
        """Return what :meth:`forward` would if each position attended only to itself: ``[b n d] -> [b n d]``"""
        return self.to_out(self.to_v(x))


class CrossAttention(Attention):
    """Attention to the context of a conditioning.

    Adapters (:mod:`ldm.nn.adapters`) of this module take the record too: they can attend to a further, named context.
    """

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:  # type: ignore[override]
        """``x [b n d] -> [b n d]``"""
        return super().forward(x, cond.context, cond.mask)


class GEGLU(nn.Module):
    """value * gelu(gate), both linear in the input (Shazeer 2020, arXiv 2002.05202); the exact-erf gelu."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[... width] -> [... hidden]``"""
        if is_plain(self.proj, nn.Linear) and uses_onednn(x, self.proj.weight):
            (value, gate), (shift, gate_shift) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
            return onednn_linear_times(x, value, shift, onednn_linear(x, gate, gate_shift, "gelu"))
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(CheckpointedBlock):
    """Self-attention, cross-attention to the context, gated feed-forward; each pre-normed and residual.

    Without ``context_width`` there is no cross-attention.
    """

    def __init__(self, width: int, heads: int, context_width: int | None, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width) if context_width else None
        self.attn2 = CrossAttention(width, heads, context_width) if context_width else None
        self.norm3 = nn.LayerNorm(width)
        self.ff = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(dropout), Linear(4 * width, width))

    def forward(
        self,
        x: Tensor,
        cond: Conditioning,
        options: AttentionOptions | None = None,
        merging: TokenMerging | None = None,
    ) -> Tensor:
        """``x [b n d] -> [b n d]``; ``merging`` is for the self-attention."""
        h = self.norm1(x)
        attended = self.attn1(h) if merging is None else merging.unmerge(self.attn1(merging.merge(h)))
        if options is not None and options.identity is not None:
            attended = torch.where(options.identity[:, None, None], self.attn1.identity(h), attended)
        x = x + attended
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), cond)
        return x + self.ff(self.norm3(x))
