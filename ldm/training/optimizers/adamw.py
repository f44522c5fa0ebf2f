"""AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldm.training.optimizers.optimizer import OptimizerConfig, decay_groups, match_memory_format, trainable
from ldm.training.sharded_tensors import by_sharding

if TYPE_CHECKING:
    from ldm.training.config import TrainConfig


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig, kind="adamw"):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Weight decay applies to parameters of two or more dimensions; biases, norms and scales do not decay.
    """

    def build(self, modules: Iterable[nn.Module], train: TrainConfig) -> AdamW:
        groups = decay_groups(trainable(modules), train.weight_decay)
        return AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)


class AdamW(torch.optim.AdamW):
    """AdamW whose groups may hold sharded parameters and others."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], fused: bool):
        super().__init__(groups, lr=lr, betas=betas, fused=fused)
        self._step_supports_amp_scaling = False  # fp16 is unscaled before it is clipped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, each tensor in the memory format of its parameter, which the fused kernel relies on."""
        super().load_state_dict(state_dict)
        match_memory_format(self)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:  # before the groups are divided, since it may change their hyperparameters
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [
            group | {"params": part} for group in self.adam_groups() for part in by_sharding(group["params"])
        ]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def adam_groups(self) -> list[dict[str, Any]]:
        """Return the groups that AdamW updates."""
        return self.param_groups
