"""Interface of the optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.config import Kind

if TYPE_CHECKING:
    from ldm.training.config import TrainConfig

FACTOR = "learning_rate_factor"
"""Key of a parameter group: factor on the learning rate of the training, 1 if absent."""


class OptimizerConfig(Kind, default="adamw"):
    """Family of the optimizers.

    What all of them need, learning rate, betas and weight decay, is in the section ``train``.
    """

    def check(self) -> None:
        """Check that the packages and the device of the optimizer are there.

        Raises:
            ConfigError: one is missing.
        """

    def build(self, modules: Iterable[nn.Module], train: TrainConfig) -> Optimizer:
        """Return the optimizer of the trainable parameters of ``modules``, which may be sharded (DTensor).

        Its parameter groups are the same in each session of a training. All values of a group but its parameters may change
        in between; the state of a parameter consists of tensors, in its memory format if they have its shape.
        """
        raise NotImplementedError

    def simulated(self, modules: Iterable[nn.Module], train: TrainConfig) -> Optimizer:
        """Return an optimizer whose ``step`` works on parameters without values, to count its memory and operations."""
        return self.build(modules, train)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups, times the factor of each."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(FACTOR, 1.0)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: those of two or more dimensions, with weight decay, and the others, without."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the trainable parameters of modules."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def match_memory_format(optimizer: Optimizer) -> None:
    """Give loaded states the memory format of their parameters, which kernels over flat memory rely on."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            same_shape = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim
            if same_shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
