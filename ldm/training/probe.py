"""Steps of a training outside of the training loop, to measure their time and to try learning rates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch

from ldm.data.samples import Batch
from ldm.data.stream import TrainStream
from ldm.devices import default_device, usual_torch_state
from ldm.training.ema import EMA
from ldm.training.experiment import Experiment
from ldm.training.handoff import initialize
from ldm.training.optimizer_step import optimizer_step
from ldm.training.optimizers import set_learning_rate
from ldm.training.stages import build_module, data_of
from ldm.training.tasks.task import Step, on_device

LOW_RATE = 1e-6
"""Learning rate of steps whose time is measured."""

WARM_UP, MEASURED = 2, 8
"""Steps before the time is measured, and steps of which it is the median."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Probe:
    """The training of a stage from its beginning, step by step; nothing is written but cached latents.

    Args:
        experiment: the experiment, whose preceding stages are there.
        stage: the stage.
        steps: most steps that are taken.

    Attributes:
        build: time in which networks and data were opened, in seconds, without that of encoding images.
        images: number of training images.
        parameters: number of trained parameters.
    """

    @usual_torch_state()
    def __init__(self, experiment: Experiment, stage: str, steps: int):
        train = getattr(experiment, stage).train
        self.train = train
        self.device = torch.device("cpu") if experiment.trainer.accelerator == "cpu" else default_device()
        self.precision = experiment.trainer.precision_of(train)
        self.experiment = experiment
        start = time.perf_counter()
        module = build_module(experiment, stage)
        if train.init:
            initialize(module.task, train.init)
        data = data_of(experiment, module)
        self.task = module.task.to(self.device).to(memory_format=torch.channels_last).train()
        if experiment.trainer.compile:
            self.task.compile_networks()
        self.task.check_batch_size(train.batch_size)
        samples, buffer = data.data.open("train"), data.data.shuffle_buffer
        self.latents = data.latents
        before = time.perf_counter()
        if self.latents is not None:
            samples = self.latents.open("train", samples, self.device)
            if data.validates:  # so that the trainings whose probe this is find these, too
                self.latents.open("val", data.data.open("val"), self.device)
            self.task.to(self.device)
        encoding = time.perf_counter() - before
        count = steps * train.accumulate
        self.batches = iter(TrainStream(samples, train.batch_size, experiment.seed, count, shuffle_buffer=buffer))
        self.specs = self.task.optimizers()
        self.optimizers = [train.optimizer.build(spec.modules, train) for spec in self.specs]
        self.ema = EMA(self.task.trainable_module, train.ema_decay) if train.ema_decay else None
        self.images = len(samples)
        self.parameters = sum(
            p.numel() for each in self.optimizers for group in each.param_groups for p in group["params"]
        )
        self.completed = 0
        self.build = time.perf_counter() - start - encoding

    @property
    def starts(self) -> tuple[int, ...]:
        """Steps from which on further networks are trained, such as a discriminator; the first is 0."""
        return tuple(sorted({spec.start for spec in self.specs}))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, DTYPES[self.precision]) if self.precision in DTYPES else nullcontext()

    @usual_torch_state()
    def step(self, learning_rate: float, number: int | None = None) -> float:
        """Take an optimizer step as the engine does, and return the loss of the trained network, averaged over its batches.

        Args:
            learning_rate: learning rate of all optimizers.
            number: number of the step, if it is to be another than the number of steps taken.
        """
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, learning_rate)
        batches = self._batches(self.completed if number is None else number)
        loss = optimizer_step(
            self.task, self.optimizers, batches, self.train.accumulate, self.train.gradient_clip, self._autocast
        )
        self.task.after_step()
        if self.ema is not None:
            self.ema.update()
        self.completed += 1
        return 0.0 if loss is None else float(loss)

    def _batches(self, number: int) -> Iterator[tuple[Batch, Step]]:
        """Yield the batches of the next optimizer step, each with its record."""
        for index in range(self.train.accumulate):
            batch: Any = on_device(next(self.batches), self.device)
            batch = batch if self.latents is None else self.latents.complete(batch, self.device)
            generator = torch.Generator().manual_seed(self.completed * self.train.accumulate + index)
            yield batch, Step(number, 0, generator)

    def timed(self, count: int, number: int | None = None) -> list[float]:
        """Return the seconds of each of ``count`` steps; ``number`` is that of :meth:`step`."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.step(LOW_RATE, number)  # reads the loss, and so waits for the device
            times.append(time.perf_counter() - start)
        return times

    def first_and_median(self) -> tuple[float, float]:
        """Return the time of the first step, in which networks are compiled, and the median time of later ones."""
        times = self.timed(WARM_UP + MEASURED)
        return times[0], median(times[WARM_UP:])
