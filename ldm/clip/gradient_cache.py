"""Gradient caching: large contrastive batches in the memory of small ones (Gao et al. 2021, arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def encode_in_chunks(encode: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None) -> Tensor:
    """Encode ``x [b ...]`` to features ``[b embed_dim]``, ``chunk`` rows at a time, whose activations are not kept.

    The loss of the features of all rows gives the gradient of each feature (step 2 of section 3.2). In the backward pass each
    chunk is encoded again to pass it on to the weights (step 3), with the same random numbers, such as those of dropout.

    Args:
        encode: encoder whose result for a row does not depend on the other rows.
        x: its input.
        chunk: rows that are encoded at a time; None, or at least b = all, whose activations are kept.
    """
    if chunk is None or chunk >= len(x):
        return encode(x)
    if not torch.is_grad_enabled():
        return torch.cat([encode(part) for part in x.split(chunk)])
    return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in x.split(chunk)])
