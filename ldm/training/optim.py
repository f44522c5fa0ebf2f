"""Optimizer and gradient clipping; both accept sharded parameters (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.training.config import TrainConfig


def adamw(modules: Iterable[nn.Module], config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the trainable parameters.

    Weight decay applies to parameters of two or more dimensions; biases, norms and scales do not decay.
    """
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    optimizer._step_supports_amp_scaling = False  # fp16 is unscaled before it is clipped
    return optimizer


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients in place so that their total L2 norm is at most ``max_norm``, if given; return the norm before scaling.

    Like ``torch.nn.utils.clip_grad_norm_``, but the norm of sharded gradients is reduced over all ranks first.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
