"""Attention for inference on a CPU, where other formulations than a call of torch's kernel are faster.

**An odd number of keys**, such as the 77 of a caption, makes torch's kernel take up to twice as long as the next multiple of 16;
:func:`padded_attention` adds keys that are masked.

**Many keys in bf16, without AMX**, make torch's kernel bound by its softmax; :func:`sigmoid_attention` has none. The logistic
function of a small argument is an exponential, sigmoid(x) = exp(x) / (1 + exp(x)), and oneDNN applies it to the fp32 results of a
matrix product before these are rounded and stored. So

    softmax(s)_ij = p_ij / sum_j p_ij,   p_ij = exp(s_ij - SHIFT), which is sigmoid(s_ij - SHIFT) up to the share p_ij,

is two matrix products for a block of queries and nothing between them: the shift is a bias, and the sum is a further channel of
the values, which are ones. One shift fits all queries, because the mean of the keys is subtracted from them: it moves all logits
of a query alike, and afterwards their mean is 0, so that by Jensen's inequality the sum is at least m exp(-SHIFT).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.inference import is_eager_cpu_inference, onednn_linear, supports_onednn_linear, uses_amx

SHIFT = 60.0
"""Logits above -27 give normal numbers of bf16; those that are lower do not matter beside the mean."""

MAX_SUM = 2.0**-8
"""Greatest sum of the p_ij of a query: no p is greater, so that sigmoid and exponential agree to a unit of bf16."""

BLOCK = 2**20
"""Logits that are computed together; they should stay in the cache."""

MULTIPLE = 16
"""Numbers of keys for which torch's kernel is fast are multiples of this."""

MIN_QUERIES = 256
"""Number of queries from which on padding the keys costs little."""


def fast_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Compute the attention by another formulation where one is faster than a call of torch's kernel; else return None.

    ``q [b h n d], k [b h m d], v [b h m d], mask [b 1 1 m]`` (True = attend) ``-> [b h n d]``
    """
    if not is_eager_cpu_inference(q):
        return None
    if mask is None and _sigmoid_pays(q, k, v) and (out := sigmoid_attention(q, k, v)) is not None:
        return out
    n, m = q.shape[2], k.shape[2]
    return padded_attention(q, k, v, mask) if m % MULTIPLE and n >= max(MIN_QUERIES, m) else None


def padded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with keys and values that are padded to a multiple of 16, and masked: as :func:`fast_attention`, of any shape."""
    m = k.shape[2]
    more = -m % MULTIPLE
    mask = q.new_ones(1, 1, 1, m, dtype=torch.bool) if mask is None else mask
    k, v = (F.pad(each, (0, 0, 0, more)) for each in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(mask, (0, more)))


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Compute softmax(q k^T / sqrt(d)) v: ``q [b h n d], k [b h m d], v [b h m d] -> [b h n d]``

    Returns None if a logit is so large that the shift does not fit (about 54 above the mean of its query).
    """
    (b, h, n, d), m = q.shape, k.shape[2]
    width = 16 * (d // 16 + 1)  # with the channel of ones, and a multiple of the vector length
    keys = k.float()
    keys = ((keys - keys.mean(2, keepdim=True)) / math.sqrt(d)).to(q.dtype).contiguous()
    values = q.new_zeros(b, h, width, m)
    values[..., :d, :], values[..., d, :] = v.transpose(2, 3), 1
    shift, out = q.new_full((m,), -SHIFT), q.new_empty(b, n, h, width).transpose(1, 2)
    for at in ((i, j) for i in range(b) for j in range(h)):
        blocks = (each[at].split(max(1, BLOCK // m)) for each in (q, out))
        for queries, result in zip(*blocks, strict=True):
            p = onednn_linear(queries, keys[at], shift, "sigmoid")
            result.copy_(onednn_linear(p, values[at]))
    sums = out[..., d : d + 1]
    return out[..., :d] / sums if sums.max() <= MAX_SUM else None


def _sigmoid_pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True for matrices of logits in bf16 so large that their exponentials are what takes the time."""
    large = k.shape[2] >= 512 and q.shape[2] * k.shape[2] >= 2**20
    bf16 = q.dtype == k.dtype == v.dtype == torch.bfloat16
    return bf16 and large and supports_onednn_linear(torch.bfloat16) and not uses_amx(q)
