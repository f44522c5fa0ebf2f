"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class EMA:
    """average <- decay * average + (1 - decay) * weights, with decay ramped as (1 + n) / (10 + n) at update n.

    Made after the networks are built and their weights are loaded; it follows the trainable parameters only.

    Args:
        module: whose trainable parameters are averaged.
        decay: in [0, 1); 0 = the average is the weights themselves.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), [p.data for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module has the averaged weights; afterwards its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["average"].keys() == self.average.keys(), "the average is of other weights"
        self.updates = state["updates"]
        for name, average in state["average"].items():
            self.average[name].copy_(average)

    def to(self, device: torch.device) -> None:
        """Move the average to where the parameters have gone."""
        self.average = {name: average.to(device) for name, average in self.average.items()}
