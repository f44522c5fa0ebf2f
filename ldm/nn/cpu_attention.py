"""Attention in bf16 for inference on CPUs with AVX-512 bf16 but without AMX, where torch's kernel is bound by its softmax.

The logistic function of a small argument is an exponential, sigmoid(x) = exp(x) / (1 + exp(x)), and oneDNN applies it to the fp32
results of a matrix product before these are rounded and stored. So with a shift c_i of each query

    softmax(s)_ij = p_ij / sum_j p_ij,   p_ij = exp(s_ij - c_i), which is sigmoid(s_ij - c_i) up to the share p_ij,

attention is two matrix products for a block of queries, and nothing between them. The shift is a further channel of the queries,
against ones in the keys; the sum is a further channel of the values, which are ones.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.inference import is_eager_cpu_inference, onednn_linear, supports_onednn_linear

BLOCK = 2**20
"""Logits that are computed together; they should stay in the cache."""

MAX_SUM, MIN_SUM = 2.0**-8, math.exp(-65)
"""Bounds on sum_j p_ij. No p is above the sum, so sigmoid and exponential agree to half a unit of bf16; and summands
exp(-20) times smaller than the sum are still normal numbers."""


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v: ``q [b h n d], k [b h m d], v [b h m d] -> [b h n d]``"""
    if is_eager_cpu_inference(q) and q.dtype == torch.bfloat16 and _pays(q, k):
        out = sigmoid_attention(q, k, v)
        if out is not None:
            return out
    return F.scaled_dot_product_attention(q, k, v)


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Compute :func:`scaled_dot_product_attention` as above; None if no shift fits all logits of a query."""
    (b, h, n, d), m = q.shape, k.shape[2]
    width = 16 * (d // 16 + 1)
    keys = k.float()
    keys = (keys - keys.mean(2, keepdim=True)) / math.sqrt(d)  # moves all logits of a query alike: their mean is 0
    covariance = keys.transpose(2, 3) @ keys / m
    deviation = (q.float() @ covariance).mul_(q).sum(-1, keepdim=True).clamp_(min=0).sqrt_()
    padded_q, padded_k, padded_v = q.new_zeros(b, h, n, width), q.new_zeros(b, h, m, width), q.new_zeros(b, h, width, m)
    padded_q[..., :d], padded_q[..., d : d + 1] = q, -(8 * deviation + 7 + math.log(m))
    padded_k[..., :d], padded_k[..., d] = keys, 1
    padded_v[..., :d, :], padded_v[..., d, :] = v.transpose(2, 3), 1
    out = q.new_empty(b, n, h, width).transpose(1, 2)
    for i in range(b * h):
        at = divmod(i, h)
        for queries, result in zip(*(each[at].split(max(1, BLOCK // m)) for each in (padded_q, out)), strict=True):
            weights = onednn_linear(queries, padded_k[at], activation="sigmoid")
            result.copy_(onednn_linear(weights, padded_v[at]))
    sums = out[..., d : d + 1]
    least, largest = sums.aminmax()
    return out[..., :d] / sums if least >= MIN_SUM and largest <= MAX_SUM else None


def _pays(q: Tensor, k: Tensor) -> bool:
    """Return True for matrices of logits so large that their exponentials are what takes the time."""
    return k.shape[2] >= 512 and q.shape[2] * k.shape[2] >= 2**20 and _is_supported()


@cache
def _is_supported() -> bool:
    return supports_onednn_linear(torch.bfloat16) and not torch.cpu._is_amx_tile_supported()
