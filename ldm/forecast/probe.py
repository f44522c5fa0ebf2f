"""Steps of a training outside of the training loop, to measure their time and to try learning rates."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from statistics import median
from typing import Any

import torch

from ldm.data.stream import TrainStream
from ldm.devices import default_device, usual_torch_state
from ldm.forecast.learning_rate import RangeTest, range_test
from ldm.training.experiment import Experiment
from ldm.training.gradient_clipping import clip_gradients
from ldm.training.optimizers import set_learning_rate
from ldm.training.stages import build_module, data_of
from ldm.training.tasks.task import Step, on_device

STAGE = "denoiser"

WARM_UP, MEASURED = 2, 8
"""Steps before the time is measured, and steps of which it is the median."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Probe:
    """The training of stage 3 with new weights, step by step; nothing is written but cached latents.

    Args:
        experiment: the experiment, whose stages 1 and 2 are there.
        steps: most steps that are taken.

    Attributes:
        build: time in which networks and data were opened, in seconds.
        images: number of training images.
        parameters: number of trained parameters.
    """

    @usual_torch_state()
    def __init__(self, experiment: Experiment, steps: int):
        train = experiment.denoiser.train
        self.train = train
        self.device = torch.device("cpu") if experiment.trainer.accelerator == "cpu" else default_device()
        self.precision = experiment.trainer.precision_of(train)
        self.experiment = experiment
        start = time.perf_counter()
        module = build_module(experiment, STAGE)
        data = data_of(experiment, module)
        self.task = module.task.to(self.device).to(memory_format=torch.channels_last).train()
        samples = data.data.open("train")
        self.latents = data.latents
        if self.latents is not None:
            samples = self.latents.open("train", samples, self.device)
            self.task.to(self.device)
        stream = TrainStream(samples, train.batch_size, experiment.seed, steps * train.accumulate)
        self.batches = iter(stream)
        self.optimizers = [train.optimizer.build(spec.modules, train) for spec in self.task.optimizers()]
        self.images = len(samples)
        self.parameters = sum(
            p.numel() for each in self.optimizers for group in each.param_groups for p in group["params"]
        )
        self.completed = 0
        self.build = time.perf_counter() - start

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, DTYPES[self.precision]) if self.precision in DTYPES else nullcontext()

    @usual_torch_state()
    def step(self, learning_rate: float) -> float:
        """Take an optimizer step as the engine does, and return the loss, averaged over its batches."""
        total = 0.0
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, learning_rate)
        for _ in range(self.train.accumulate):
            batch: Any = on_device(next(self.batches), self.device)
            batch = batch if self.latents is None else self.latents.complete(batch, self.device)
            generator = torch.Generator().manual_seed(self.completed)
            with self._autocast():
                for loss in self.task.losses(batch, Step(self.completed, 0, generator)):
                    value = loss.value / self.train.accumulate
                    with torch.autocast(self.device.type, enabled=False):
                        value.backward()
                    total += float(value.detach())
        for optimizer in self.optimizers:
            clip_gradients(
                list(chain(*(group["params"] for group in optimizer.param_groups))), self.train.gradient_clip
            )
            optimizer.step()
            optimizer.zero_grad()
        self.task.after_step()
        self.completed += 1
        return total

    def seconds(self, learning_rate: float) -> float:
        """Return the median time of a step."""
        times = []
        for number in range(WARM_UP + MEASURED):
            start = time.perf_counter()
            self.step(learning_rate)  # reads the loss, and so waits for the device
            if number >= WARM_UP:
                times.append(time.perf_counter() - start)
        return median(times)

    def range_test(self, steps: int) -> RangeTest:
        """Try learning rates; the weights are of no use afterwards."""
        return range_test(self.step, steps)
