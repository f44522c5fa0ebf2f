"""Exponential moving average of weights, which may be sharded (DTensor)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn import power_profiles
from ldm.training.sharded_tensors import by_sharding, full_tensor, sharded_like


class EMA:
    """average <- decay * average + (1 - decay) * weights, with decay ramped as (1 + n) / (10 + n) at update n.

    Create it after the networks are built, loaded and sharded. Only parameters that are trainable at that time are averaged.
    The average of a sharded parameter has the same sharding.

    Args:
        module: network whose trainable parameters are averaged.
        decay: in [0, 1); 0 = the average equals the weights.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        self.updates += 1
        decay = self.decay_at(self.updates)
        weights = [parameter.detach() for parameter in self.parameters.values()]
        for averages, now in zip(by_sharding(self.average.values()), by_sharding(weights), strict=True):
            torch._foreach_lerp_(averages, now, 1 - decay)

    def decay_at(self, update: int) -> float:
        """Return the decay at an update, from 1."""
        return min(self.decay, (1 + update) / (10 + update))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the averaged weights into the module within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the count of updates and the average, sharded as the weights are."""
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        assert state["average"].keys() == self.average.keys(), "the average belongs to other weights"
        self.updates = state["updates"]
        for name, saved in state["average"].items():
            self.average[name].copy_(sharded_like(saved, self.average[name]))

    def to(self, device: torch.device) -> None:
        """Move the average to the device of the parameters."""
        self.average = {name: average.to(device) for name, average in self.average.items()}


class PowerEMA(EMA):
    """Average with a power-function profile of a length; see :mod:`ldm.nn.power_profiles`.

    Its length in steps grows with the training; the first update replaces the initial weights.
    """

    def __init__(self, module: nn.Module, length: float):
        super().__init__(module, 0.0)
        self.length = length

    def decay_at(self, update: int) -> float:
        return power_profiles.decay(self.length, update)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinite values; sharded ones are tested on all ranks."""
    tests = ((name, tensor.isfinite().all()) for name, tensor in tensors.items() if tensor.is_floating_point())
    return next((name for name, finite in tests if not full_tensor(finite)), None)
