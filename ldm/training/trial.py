"""Calls of a task outside of its training steps, which leave nothing changed.

Before the first step, every part of a training that runs later is tried once; before a checkpoint is written, the loss is
computed with its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.errors import LdmError, TrainingError, first_line
from ldm.training.tasks.task import Splits, Step, Task, on_device


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode within the block, then restore the mode of each submodule."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Restore, after the block, all buffers (statistics, codebooks) and the memory format of frozen parameters."""
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    frozen = {parameter: parameter.data for parameter in module.parameters() if not parameter.requires_grad}
    try:
        yield
    finally:
        for buffer, value in buffers.items():
            buffer.copy_(value)
        for parameter, data in frozen.items():
            parameter.data = data


def infinite_loss(
    task: Task, batch: Mapping[str, Any], step: Step, autocast: AbstractContextManager[Any]
) -> float | None:
    """Return the first loss of a training step on ``batch`` that is NaN or infinite; None if all are finite."""
    with torch.enable_grad(), unchanged(task), autocast:
        values = (float(loss.value.detach()) for loss in task.losses(batch, step))
        return next((value for value in values if not math.isfinite(value)), None)


def try_settings(
    task: Task,
    splits: Splits,
    validates: bool,
    batch_size: int,
    step: Callable[[str, int], Step],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Compute all losses of a step, a validation and the beginning of the previews once.

    Args:
        task: the task, on its device.
        splits: opens the data.
        validates: True if there are validation data.
        batch_size: samples of the batches.
        step: makes the record of a step, from the name of its generator and its number.
        autocast: makes the context of the networks' precision.

    Raises:
        LdmError: one of them cannot be computed with this config and data.
    """
    last = max(spec.start for spec in task.optimizers())  # by then all optimizers are active

    def losses() -> None:
        # Data are read outside of autocast, as in training.
        batch = _first(splits("train"), batch_size, task.device)
        with autocast():
            for _ in task.losses(batch, step("train", last)):
                pass

    @torch.no_grad()
    def validation() -> None:
        batch = _first(splits("val"), batch_size, task.device)
        with evaluation_mode(task), autocast():
            results = task.evaluate(batch, step("validation", last))
        if task.monitor not in task.metrics(results):
            raise TrainingError(f"the validation of stage {task.stage} does not compute {task.monitor}.")

    @torch.no_grad()
    def previews() -> None:
        with evaluation_mode(task):
            task.try_previews(splits, step("pictures", last))

    attempts: dict[str, Callable[[], object]] = {
        "its annotations do not fit": lambda: task.check_annotations(
            [splits(split) for split in ("train", "val")[: 1 + validates]]
        ),
        "its losses cannot be computed": losses,
        **({"its validation cannot be computed": validation} if validates else {}),
        "its previews cannot be made": previews,
    }
    for problem, attempt in attempts.items():
        try:
            with unchanged(task):
                attempt()
        except LdmError as error:
            raise type(error)(f"stage {task.stage} cannot be trained, since {problem}: {error}") from None
        except Warning:  # one that a filter turns into an exception
            raise
        except Exception as error:  # of torch, for settings that no check foresees
            raise TrainingError(
                f"stage {task.stage} cannot be trained, since {problem} ({type(error).__name__}: {first_line(error)}); change "
                "its config or data (--debug shows where it failed)."
            ) from error


def _first(samples: Samples, count: int, device: torch.device) -> Batch:
    """Return a batch of the first samples, repeated if there are fewer."""
    return on_device(samples[BatchIndices(np.arange(count) % len(samples))], device)
