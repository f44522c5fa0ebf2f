"""Our training step, as the engine makes it, and the loop of the other libraries' training scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.benchmarks.case import Setup, Work
from ldm.training.config import TrainConfig
from ldm.training.ema import EMA
from ldm.training.gradient_clipping import clip_gradients
from ldm.training.optimizers.adamw import AdamWConfig
from ldm.training.tasks.task import Step, Task

BACKWARD = "forward and backward"
"""Title of the part of a step that computes the gradients."""


def autocast(setup: Setup) -> AbstractContextManager[Any]:
    """Return the autocast in which a step of the run computes its losses; fp32 needs none."""
    return torch.autocast(setup.device.type, setup.dtype, enabled=setup.dtype != torch.float32)


class OurTraining:
    """Steps of a task: losses, backward passes, gradient clipping, AdamW and EMA, as ``StageModule.training_step`` does them.

    The optimizer is AdamW, whichever the config names, since it is that of the other libraries' scripts.

    Args:
        task: with weights on the device.
        config: hyperparameters.
        batch: batch of every step.
        setup: of the run.
        number: number of completed steps, which decides what losses are active.
    """

    def __init__(self, task: Task, config: TrainConfig, batch: Mapping[str, Any], setup: Setup, number: int = 0):
        task.to(memory_format=torch.channels_last)  # as StageModule.configure_model does
        self.task, self.config, self.batch, self.setup, self.number = task, config, batch, setup, number
        self.specs = task.optimizers()
        self.optimizers = [AdamWConfig().build(spec.modules, config) for spec in self.specs]
        self.parameters = [[p for group in each.param_groups for p in group["params"]] for each in self.optimizers]
        self.ema = EMA(task.trainable_module, config.ema_decay) if config.ema_decay else None
        if setup.compile is not None:
            for module in task.called_modules:  # as trainer.compile does
                module.compile()

    def step(self) -> Tensor:
        """Make a step; return its losses."""
        loss = self._losses(update=True)
        self.task.after_step()
        if self.ema is not None:
            self.ema.update()
        return loss

    def gradients(self) -> Tensor:
        """Compute the gradients of a step; return its losses."""
        return self._losses(update=False)

    def _losses(self, update: bool) -> Tensor:
        step, values = Step(self.number, 0, self.setup.generator()), []
        losses = self.task.losses(self.batch, step)
        for own, optimizer in zip(self.parameters, self.optimizers, strict=True):
            if len(self.parameters) > 1:
                for parameters in self.parameters:
                    for parameter in parameters:
                        parameter.requires_grad_(parameters is own)
            with autocast(self.setup):
                loss = next(losses).value
            loss.backward()
            if update:
                clip_gradients(own, self.config.gradient_clip)
                optimizer.step()
            optimizer.zero_grad()
            values.append(float(loss.detach()))
        return torch.tensor(values)

    def work(self, network: nn.Module) -> Work:
        """Return the step and its parts; ``network`` is the one that is trained."""
        return Work(self.step, network, {BACKWARD: self.gradients}, self.task)


@dataclass
class TheirTraining:
    """Steps of a script: autocast, ``torch.nn.utils.clip_grad_norm_``, ``torch.optim.AdamW`` and the script's EMA.

    Attributes:
        losses: for each optimizer, in this order, a function that returns its loss; called under autocast.
        modules: for each of them, the module that is trained.
        config: hyperparameters, those of ours.
        setup: of the run.
        after_step: called after the optimizers' steps, such as the update of an average.
    """

    losses: Sequence[Callable[[], Tensor]]
    modules: Sequence[nn.Module]
    config: TrainConfig
    setup: Setup
    after_step: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        config = self.config
        self.optimizers = [
            torch.optim.AdamW(
                _groups(each.parameters(), config.weight_decay), lr=config.learning_rate, betas=config.betas
            )
            for each in self.modules
        ]

    def step(self) -> Tensor:
        """Make a step; return the losses."""
        losses = self._losses(update=True)
        self.after_step()
        return losses

    def gradients(self) -> Tensor:
        """Compute the gradients of a step; return the losses."""
        return self._losses(update=False)

    def _losses(self, update: bool) -> Tensor:
        values = []
        for function, module, optimizer in zip(self.losses, self.modules, self.optimizers, strict=True):
            with autocast(self.setup):
                loss = function()
            loss.backward()
            if update:
                if self.config.gradient_clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), self.config.gradient_clip)
                optimizer.step()
            optimizer.zero_grad()
            values.append(float(loss.detach()))
        return torch.tensor(values)

    def work(self, network: nn.Module) -> Work:
        """Return the step and its parts."""
        return Work(self.step, network, {BACKWARD: self.gradients})


def ema_of(module: nn.Module, config: TrainConfig) -> Callable[[], object]:
    """Return the update of diffusers' ``EMAModel`` of a module, as its training scripts make it; nothing if there is no EMA."""
    if not config.ema_decay:
        return lambda: None
    from diffusers.training_utils import EMAModel

    average = EMAModel(module.parameters(), decay=config.ema_decay)
    average.to(next(module.parameters()).device)
    return lambda: average.step(module.parameters())


def _groups(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups with and without weight decay, as open_clip and ours have them."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
