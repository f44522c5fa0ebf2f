"""Costs of a training step: floating-point operations and memory, counted without weights, values or a device.

One step of the real task is run on tensors that have shapes alone, so that frozen encoders, the discriminator, recomputed
activations and the precision of each operation are counted as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ldm.data.buckets import Shape
from ldm.data.samples import Batch, BatchIndices, captions_of
from ldm.data.teacher import TEACHER
from ldm.errors import LdmError
from ldm.formats import native
from ldm.nn.gradient_checkpointing import set_gradient_checkpointing
from ldm.training.accelerators import cublas_workspace
from ldm.training.config import TrainConfig
from ldm.training.ema import EMA, PowerEMA
from ldm.training.optimizer_step import optimizer_step
from ldm.training.simulation import CostCounter, autocast, compute_norms_in_fp32, remove_values
from ldm.training.tasks import TASKS, CLIPTask, DenoiserTask
from ldm.training.tasks.task import Step, Task

if TYPE_CHECKING:
    from ldm.training.experiment import Experiment

CAPTIONS, BATCHES = 4096, 256
"""Numbers of training captions, and of random batches of them, from which the length of a batch in tokens is estimated."""


ALL_BATCHES = math.nextafter(1.0, 0.0)
"""Share of the batches with self-conditioning that is so near to 1 that all have it."""

CUBLAS_HANDLES = 2
"""Handles of cuBLAS in a training: torch computes the backward pass of a device in a thread of its own."""


@dataclass(frozen=True)
class StepCost:
    """Costs of one optimizer step on one device; memory in bytes, at the time when most is in use.

    Attributes:
        samples: samples of the step, accumulated ones included.
        flops: floating-point operations of matrix products, convolutions and attention, forward and backward.
        weights: parameters and buffers of all networks.
        trained: the part of ``weights`` that is trained.
        optimizer: moments of Adam.
        ema: averaged weights.
        gradients: gradients.
        activations: the batch, and what is computed from it.
        workspaces: memory of cuBLAS on CUDA.
    """

    samples: int
    flops: int
    weights: int
    trained: int
    optimizer: int
    ema: int
    gradients: int
    activations: int
    workspaces: int = 0

    @property
    def memory(self) -> int:
        """Most bytes of tensors and workspaces at any time of the step."""
        return self.weights + self.optimizer + self.ema + self.gradients + self.activations + self.workspaces

    def sharded_memory(self, devices: int) -> int:
        """Return :attr:`memory` for each of ``devices`` that share trained weights, gradients, moments and averages (FSDP).

        The weights of the layers that are being computed, which each device gathers, are not counted.
        """
        shared = self.trained + self.optimizer + self.ema + self.gradients
        return self.memory - shared + shared // devices


def flops_by_shape(experiment: Experiment, stage: str) -> Callable[[Shape], float]:
    """Return a function from the shape of a batch's images to :func:`flops_per_sample`.

    Convolutions take operations in proportion to the number of pixels, and attention to its square, so that a parabola through
    the values of three of the shapes of the aspect buckets gives those of all.
    """
    data = experiment.data_of(stage)
    by_pixels = {math.prod(shape): shape for shape in data.bucket_shapes or (data.image_shape[1:],)}
    pixels = sorted(by_pixels)
    chosen = sorted({pixels[0], pixels[len(pixels) // 2], pixels[-1]})
    flops = [flops_per_sample(experiment, stage, shape=by_pixels[each]) for each in chosen]

    def interpolated(shape: Shape) -> float:
        at, total = math.prod(shape), 0.0
        for here, value in zip(chosen, flops, strict=True):  # Lagrange's formula
            total += value * math.prod((at - other) / (here - other) for other in chosen if other != here)
        return total

    return interpolated


def flops_per_sample(experiment: Experiment, stage: str, step: int | None = None, shape: Shape | None = None) -> float:
    """Return the floating-point operations that the networks need for a training sample, forward and backward.

    Activations that gradient checkpointing or caching computes again do not count: this is the numerator of MFU (Chowdhery et al.
    2022, arXiv 2204.02311, appendix B).

    Args:
        experiment: the experiment.
        stage: the stage.
        step: number of the optimizer step; None = the last, when all losses are active.
        shape: as in :func:`step_cost`.
    """
    if experiment.clip is not None and experiment.clip.gradient_cache is not None:
        experiment = replace(experiment, clip=replace(experiment.clip, gradient_cache=None))
    cost = step_cost(experiment, stage, step, gradient_checkpointing=False, shape=shape)
    return cost.flops / cost.samples


def outline(experiment: Experiment, stage: str, captions: Sequence[str] = ("",)) -> Task:
    """Build the task of a stage on the meta device, without weights or files; ``captions`` are for its tokenizer."""
    with torch.device("meta"), native.WithoutInit():
        return TASKS[stage].outline(experiment, captions).train()


def step_cost(
    experiment: Experiment,
    stage: str,
    step: int | None = None,
    *,
    precision: str | None = None,
    device_type: str = "cpu",
    device: str | None = None,
    gradient_checkpointing: bool | None = None,
    shape: Shape | None = None,
) -> StepCost:
    """Count the costs of one optimizer step of a stage on one device: with self-conditioning, the mean operations of a step.

    Args:
        experiment: the experiment.
        stage: the stage.
        step: number of the step; None = the last, when all losses are active.
        precision: fp32, bf16 or fp16; None = as the config says, on this machine.
        device_type: ``cpu`` or ``cuda``, whose autocast differs in what is computed in fp32.
        device: CUDA device of :data:`ldm.training.accelerators.ACCELERATORS`; None = this machine's.
        gradient_checkpointing: whether activations are computed again; None = as the config says.
        shape: height and width of the images in pixels; None = the largest that the data have.
    """
    share = experiment.denoiser.model.self_conditioning
    if stage == DenoiserTask.stage and 0 < share < ALL_BATCHES:
        options: dict[str, Any] = {"precision": precision, "device_type": device_type, "device": device, "shape": shape}
        options["gradient_checkpointing"] = gradient_checkpointing
        never, always = (
            step_cost(_with_self_conditioning(experiment, each), stage, step, **options) for each in (0.0, ALL_BATCHES)
        )
        return replace(always, flops=round(never.flops + share * (always.flops - never.flops)))
    train: TrainConfig = getattr(experiment, stage).train
    captions, data = _captions(experiment, stage), experiment.data_of(stage)
    task = outline(experiment, stage, captions)
    remove_values(task)
    if device_type == "cuda":
        compute_norms_in_fp32(task)
    set_gradient_checkpointing(
        task, train.gradient_checkpointing if gradient_checkpointing is None else gradient_checkpointing
    )
    optimizers = [train.optimizer.simulated(spec.modules, train) for spec in task.optimizers()]
    averages = [EMA(task.trainable_module, train.ema_decay)] if train.ema_decay else []
    if train.ema_snapshots is not None:
        averages += [PowerEMA(task.trainable_module, each) for each in train.ema_snapshots.lengths]
    parameters = [[p for group in each.param_groups for p in group["params"]] for each in optimizers]
    for optimizer, own in zip(optimizers, parameters, strict=True):  # an empty step, which makes the moments
        for parameter in own:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    trained = [*chain(*parameters)]
    weights = [*task.parameters(), *task.buffers()]
    moments = [value for each in optimizers for state in each.state.values() for value in state.values()]
    average = [value for each in averages for value in each.average.values()]
    number = train.max_steps - 1 if step is None else step
    precision = precision or experiment.trainer.precision_of(train)
    shape = shape or max(data.bucket_shapes or (data.image_shape[1:],), key=math.prod)
    teacher = None if task.teacher is None else task.teacher.encode(torch.zeros(1, 3, *shape)).shape[1:]

    with CostCounter([*weights, *moments, *average], trained) as counter:
        typical = [_typical(captions, task, train.batch_size)] * train.batch_size
        batch = _batch(experiment, task, typical, shape, teacher)
        batches = min(train.accumulate, 2)
        accumulated = [(batch, Step(number, 0, torch.Generator().manual_seed(0)))] * batches
        optimizer_step(task, optimizers, accumulated, batches, train.gradient_clip, partial(autocast, precision))
        for each in averages:
            each.update()
    fixed = [_bytes(tensors) for tensors in (weights, moments, average)]
    return StepCost(
        samples=train.batch_size * train.accumulate,
        flops=counter.flops * train.accumulate // batches,
        weights=fixed[0],
        trained=_bytes(trained),
        optimizer=fixed[1],
        ema=fixed[2],
        gradients=counter.gradients,
        activations=counter.peak - sum(fixed) - counter.gradients,
        workspaces=CUBLAS_HANDLES * cublas_workspace(device) if device_type == "cuda" else 0,
    )


def _with_self_conditioning(experiment: Experiment, share: float) -> Experiment:
    """Return the experiment with self-conditioning in a share of the batches."""
    model = replace(cast(Any, experiment.denoiser.model), self_conditioning=share)
    return replace(experiment, denoiser=replace(experiment.denoiser, model=model))


def _batch(
    experiment: Experiment, task: Task, captions: Sequence[str], shape: Shape, teacher: Sequence[int] | None
) -> Batch:
    """Return a batch of black images or cached latents, or both, with these captions and without other conditions.

    Features of a teacher have the shape ``teacher``, and are cached where latents are.
    """
    n, channels, (height, width) = len(captions), experiment.data.image_shape[0], shape
    conditions = dict.fromkeys(experiment.denoiser.conditioner.input_keys, [None] * n)
    batch: Batch = {**conditions, "key": [str(i) for i in range(n)], "text": captions}
    first_stage = task.frozen_first_stage if experiment.data.has_latents else None
    if first_stage is None or task.needs_images:
        batch["image"] = torch.zeros(n, channels, height, width)
    if first_stage is None:
        return batch
    if teacher is not None:
        batch[TEACHER] = torch.zeros(n, *teacher)
    size = (n, first_stage.latent_channels, height // first_stage.factor, width // first_stage.factor)
    return batch | {name: torch.zeros(size) for name in first_stage.posterior_type.cached}


def _captions(experiment: Experiment, stage: str) -> list[str]:
    """Return captions of the training data if the cost of the stage depends on them and they can be read, else long ones."""
    if stage != CLIPTask.stage or experiment.clip is None:  # the context of a denoiser has a fixed length
        return [""]
    try:
        samples = experiment.data.open("train")
        generator = np.random.default_rng(0)
        index = generator.permutation(len(samples))[:CAPTIONS]
        draw = BatchIndices(index, generator.random((len(index), 3), np.float32))  # with augmented captions
        return captions_of(samples.annotations(draw), "")
    except LdmError:
        return ["x " * experiment.clip.tokenizer.context_length]


def _typical(captions: Sequence[str], task: Task, batch_size: int) -> str:
    """Return a caption that is as long as the longest of a batch is on average, in tokens, to which a CLIP pads the batch."""
    if not isinstance(task, CLIPTask):
        return captions[0]

    def length(caption: str) -> int:
        return task.tokenizer(caption, longest=True).shape[1]

    lengths, generator = [length(caption) for caption in captions], np.random.default_rng(0)
    epochs = -(-BATCHES * batch_size // len(captions))
    batches = np.concatenate([generator.permutation(lengths) for _ in range(epochs)])[: BATCHES * batch_size]
    mean, longest = round(batches.reshape(BATCHES, -1).max(1).mean()), captions[int(np.argmax(lengths))]
    return next(longest[:end] for end in range(len(longest) + 1) if length(longest[:end]) >= mean)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
