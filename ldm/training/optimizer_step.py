"""An optimizer step outside of the training loop, to measure its costs and its time and to try learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ldm.data.samples import Batch
from ldm.training.gradient_clipping import clip_gradients
from ldm.training.tasks.task import Step, Task


def optimizer_step(
    task: Task,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterable[tuple[Batch, Step]],
    count: int,
    gradient_clip: float | None,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor | None:
    """Take a step as :class:`ldm.training.engine.StageModule` does, without Lightning, several devices and averages.

    Args:
        task: the task, in training mode.
        optimizers: those that the task declares.
        batches: batches whose gradients are accumulated, each with its record.
        count: number of these batches.
        gradient_clip: largest norm of the gradients of an optimizer; None = any.
        autocast: precision of the forward passes.

    Returns:
        The loss of the first optimizer, averaged over the batches; None if it is not active.
    """
    parameters = [list(chain(*(group["params"] for group in each.param_groups))) for each in optimizers]
    total: Tensor | None = None
    for number, (batch, step) in enumerate(batches, start=1):
        with autocast():
            losses = task.losses(batch, step)
            for i, (spec, optimizer) in enumerate(zip(task.optimizers(), optimizers, strict=True)):
                if step.number < spec.start:
                    continue
                others = list(chain(*(each for j, each in enumerate(parameters) if j != i)))
                for parameter in others:
                    parameter.requires_grad_(False)
                loss = next(losses).value / count
                with torch.autocast(loss.device.type, enabled=False):
                    loss.backward()
                if i == 0:
                    total = loss.detach() if total is None else total + loss.detach()
                if number == count:
                    clip_gradients(parameters[i], gradient_clip)
                    optimizer.step()
                    optimizer.zero_grad()
                for parameter in others:
                    parameter.requires_grad_(True)
    return total
