"""Gradient clipping, also of sharded parameters (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ldm.training.sharded_tensors import by_sharding, full_tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients in place so that their total L2 norm is at most ``max_norm``, if given; return the norm before scaling.

    Like ``torch.nn.utils.clip_grad_norm_``, but the norm of sharded gradients is reduced over all ranks first.
    """
    parts = by_sharding(parameters)
    norms = [full_tensor(get_total_norm([p.grad for p in part if p.grad is not None])) for part in parts]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if max_norm is not None and not (norm.device.type == "cpu" and norm + 1e-6 <= max_norm):  # spares a pass over them
        for part in parts:
            clip_grads_with_norm_(part, max_norm, norm)
    return norm
