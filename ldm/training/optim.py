"""Optimizer and gradient clipping; both accept sharded parameters (DTensor)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ldm.training.config import TrainConfig
from ldm.training.sharded_tensors import by_sharding, full_tensor


class AdamW(torch.optim.AdamW):
    """AdamW whose groups may hold sharded parameters and others."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, each tensor in the memory format of its parameter, which the fused kernel relies on."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:  # before the groups are divided, since it may change their hyperparameters
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group | {"params": part} for group in groups for part in by_sharding(group["params"])]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss


def adamw(modules: Iterable[nn.Module], config: TrainConfig) -> AdamW:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the trainable parameters.

    Weight decay applies to parameters of two or more dimensions; biases, norms and scales do not decay.
    """
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    optimizer._step_supports_amp_scaling = False  # fp16 is unscaled before it is clipped
    return optimizer


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
