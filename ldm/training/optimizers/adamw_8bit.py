"""AdamW with moments of 8 bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ldm.errors import ConfigError
from ldm.training.optimizers.optimizer import OptimizerConfig, decay_groups, trainable

if TYPE_CHECKING:
    from ldm.training.config import TrainConfig

LEAST, BLOCK = 4096, 256
"""Number of values of a parameter from which its moments have 8 bits, and of the values that share a scale."""


@dataclass(frozen=True)
class AdamW8bitConfig(OptimizerConfig, kind="adamw_8bit"):
    """AdamW with both moments in 8 bits, with a scale for each 256 values (Dettmers et al. 2022, arXiv 2110.02861).

    Parameters of fewer than 4096 values keep moments of 32 bits. By bitsandbytes (extra ``adam8bit``); not with fsdp2.
    """

    def check(self) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "train.optimizer has the kind adamw_8bit, but bitsandbytes is not installed; pip install 'ldm[adam8bit]'."
            )

    def build(self, modules: Iterable[nn.Module], train: TrainConfig) -> Optimizer:
        self.check()
        parameters = trainable(modules)
        if any(isinstance(each, DTensor) for each in parameters):
            raise ConfigError(
                "train.optimizer has the kind adamw_8bit, which takes no sharded parameters; choose adamw, or another "
                "trainer.strategy than fsdp2."
            )
        return _adamw_8bit(decay_groups(parameters, train.weight_decay), train.learning_rate, train.betas)

    def simulated(self, modules: Iterable[nn.Module], train: TrainConfig) -> Optimizer:
        return _States(decay_groups(trainable(modules), train.weight_decay), {})


def _adamw_8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    class ChannelsLast(AdamW8bit):
        """AdamW8bit that leaves parameters in their memory format; its state is in the order of contiguous ones."""

        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            channels_last = not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
            super().update_step(group, p, gindex, pindex)
            if channels_last:
                p.data = p.data.contiguous(memory_format=torch.channels_last)

    optimizer: Optimizer = ChannelsLast(groups, lr=lr, betas=betas, min_8bit_size=LEAST)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # fp16 is unscaled before it is clipped
    return optimizer


class _States(Optimizer):
    """Optimizer that makes states of the size of those of bitsandbytes, and updates nothing."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or self.state[parameter]:
                    continue
                small = parameter.numel() < LEAST
                dtype = torch.float32 if small else torch.uint8
                state = {name: torch.zeros_like(parameter, dtype=dtype) for name in ("state1", "state2")}
                if not small:
                    blocks = -(-parameter.numel() // BLOCK)
                    state |= {name: parameter.new_zeros(blocks) for name in ("absmax1", "absmax2")}
                self.state[parameter] = state
