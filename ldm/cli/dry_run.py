"""Summary of a training and of what it costs, computed without weights or a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ldm.config import to_yaml
from ldm.data import DataConfig
from ldm.data.order_table import order_table
from ldm.data.samples import Samples
from ldm.errors import ConfigError, LdmError
from ldm.training.accelerators import Accelerator, accelerator, this_machine
from ldm.training.config import TrainConfig
from ldm.training.costs import StepCost, outline, step_cost
from ldm.training.experiment import Experiment
from ldm.training.tasks import Task

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Machine for which costs are computed.

    Args:
        device: name of a device of :mod:`ldm.training.accelerators`; None = this machine's.
        devices: number of devices; None = ``trainer.devices``, or 1 if that is auto.
        mfu: share of a device's peak that the training reaches, in (0, 1].
        price: price of a device for an hour; None = no price is shown.
    """

    device: str | None = None
    devices: int | None = None
    mfu: float = 0.4
    price: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu is {self.mfu}; give a share of the device's peak above 0 and at most 1.")
        if self.devices is not None and self.devices < 1:
            raise ConfigError(f"--devices is {self.devices}; give at least 1.")


class _Device(NamedTuple):
    """A device by name; its throughput is None if it is not known."""

    name: str
    speed: Accelerator | None

    @property
    def type(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"

    def precision(self, experiment: Experiment, train: TrainConfig) -> str:
        """Return the precision of a stage on this device."""
        given = train.precision or experiment.trainer.precision
        if given != "auto" or self.speed is None:
            return experiment.trainer.precision_of(train)
        return "bf16" if self.speed.bf16 else "fp32"


def describe(experiment: Experiment, stages: Sequence[str], machine: Machine | None = None) -> str:
    """Return the resolved config, and for each stage its parameters, batch, learning rate, operations, time, memory and disk."""
    machine = machine or Machine()
    name = machine.device or this_machine()
    device = _Device("gpu", None) if name is None else _Device(name.lower(), accelerator(name))
    count = machine.devices or experiment.trainer.devices
    count = count if isinstance(count, int) else 1
    opened = _Opened()
    lines, total = [to_yaml(experiment).rstrip(), "", *_filtered(experiment.data, opened)], 0.0
    for stage in stages:
        text, hours = _stage(experiment, stage, machine, device, count, opened)
        lines += [f"stage {stage}", *(f"  {line}" for line in text)]
        total += hours
    if device.speed is not None and len(stages) > 1:
        lines.append(f"all stages: {_hours(total)}{_price(total * count, machine)}")
    factor = experiment.vae.model.factor
    shape = (experiment.vae.model.latent_channels, *(side // factor for side in experiment.model_config.size))
    lines.append(f"the stages fit each other: latents {' x '.join(map(str, shape))}")
    return "\n".join(lines)


class _Opened:
    """Splits of the data, each opened once, since filters read all samples of a set without an index."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, bool], Samples] = {}

    def open(self, data: DataConfig, split: str) -> Samples:
        """Open a split of the data of a stage, with aspect buckets or without."""
        key = split, bool(data.bucket_shapes)
        if key not in self._samples:
            self._samples[key] = data.open(split)
        return self._samples[key]


def _filtered(data: DataConfig, opened: _Opened) -> list[str]:
    """Return what the filters of the data drop, line by line, or why they cannot be applied."""
    lines: list[str] = []
    for split in ("train", "val"):
        if split in data.filters.splits and data.filters.given and data.has(split):
            try:
                selection = opened.open(data, split).selection
                lines += selection.describe(split) if selection is not None else []
            except LdmError as error:
                lines.append(f"data.filters cannot be applied to data.{split}: {error}")
    return [*lines, ""] if lines else []


def _stage(
    experiment: Experiment, stage: str, machine: Machine, device: _Device, count: int, opened: _Opened
) -> tuple[list[str], float]:
    """Return the description of a stage, and its hours (0 if the throughput of the device is not known)."""
    train: TrainConfig = getattr(experiment, stage).train
    task, precision = outline(experiment, stage), device.precision(experiment, train)

    def cost(step: int | None = None, checkpointing: bool | None = None) -> StepCost:
        return step_cost(
            experiment,
            stage,
            step,
            precision=precision,
            device_type=device.type,
            device=None if device.speed is None or device.type == "cpu" else device.name,
            gradient_checkpointing=checkpointing,
        )

    last = cost()
    batch = train.batch_size * train.accumulate
    trained = sum(
        p.numel() for spec in task.optimizers() for m in spec.modules for p in m.parameters() if p.requires_grad
    )
    lines = [
        *(
            f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters"
            for name, network in task.networks.items()
        ),
        f"trained: {trained:,} parameters, for {train.max_steps:,} steps",
        f"batch: {train.batch_size} x {train.accumulate} accumulated = {batch} per device",
        *_order(experiment, stage, train.batch_size * count, opened),
        f"learning rate: {train.learning_rate:g} after {train.warmup_steps} steps, then {train.decay.kind}",
        f"operations: {_flops(last.flops / batch)} per sample, {_flops(last.flops)} per step and device, forward and backward",
    ]
    starts = sorted({0, *(spec.start for spec in task.optimizers() if spec.start < train.max_steps)})
    total, end = last.flops * (train.max_steps - starts[-1]), starts[-1]
    for start in reversed(starts[:-1]):  # the steps before the discriminator
        flops = cost(start).flops
        lines.append(f"            {_flops(flops / batch)} per sample before step {end:,}")
        total, end = total + flops * (end - start), start
    hours = 0.0
    if device.speed is not None:
        peak = device.speed.peak(precision)
        hours = total / (peak * machine.mfu) / 3600
        lines.append(
            f"time: {_hours(hours)} on {count} x {device.name} at {machine.mfu:.0%} of its peak of {peak / 1e12:.4g} TFLOP/s in "
            f"{precision}{_price(hours * count, machine)}"
        )
    lines += _memory(last, cost(checkpointing=not train.gradient_checkpointing), train, precision, count)
    return lines + _disk(experiment, task, last, opened), hours


def _order(experiment: Experiment, stage: str, batch: int, opened: _Opened) -> list[str]:
    """Return the tables of sources and aspect buckets, if there are any and the data can be read."""
    data = experiment.data_of(stage)
    if not (data.bucket_shapes or data.mixture):
        return []
    try:
        return order_table(opened.open(data, "train"), batch)
    except LdmError as error:
        return [f"the sources and buckets cannot be counted: {error}"]


def _memory(cost: StepCost, other: StepCost, train: TrainConfig, precision: str, count: int) -> list[str]:
    """Return the lines on memory; ``other`` is the cost with gradient checkpointing if the config is without, and vice versa."""
    fixed = cost.weights + cost.optimizer + cost.ema
    lines = [
        f"memory: about {_gib(cost.memory)} per device in {precision} ({_gib(fixed)} weights, optimizer and EMA, "
        f"{_gib(cost.memory - fixed)} gradients, activations and workspaces)"
    ]
    costs = {f"{'without' if train.gradient_checkpointing else 'with'} gradient checkpointing": other}
    lines += [f"        {_gib(each.memory)} {name}" for name, each in costs.items()]
    if count > 1:
        for name, each in {"": cost, **{f", {name}": each for name, each in costs.items()}}.items():
            lines.append(f"        {_gib(each.sharded_memory(count))} sharded over {count} devices{name}")
    return lines


def _disk(experiment: Experiment, task: Task, cost: StepCost, opened: _Opened) -> list[str]:
    """Return the lines on disk space; that of latents if the images can be counted."""
    towers = sum(tensor.nbytes for tower in task.image_towers.values() for tensor in tower.state_dict().values())
    lines = [f"disk: {_gib(cost.weights - towers + cost.optimizer + cost.ema)} for each checkpoint"]
    first_stage, data = task.frozen_first_stage, experiment.data
    if first_stage is None:
        return lines
    try:
        by_shape = [opened.open(data, split).by_shape() for split in ("train", "val") if data.has(split)]
    except LdmError:
        return lines
    sizes = [(len(each), shape or data.image_shape[1:]) for split in by_shape for shape, each in split.items()]
    images = sum(count for count, _ in sizes)
    pixels = sum(count * math.prod(side // first_stage.factor for side in shape) for count, shape in sizes)
    values = len(first_stage.posterior_type.cached) * first_stage.latent_channels * pixels
    cached = "" if data.has_latents else ", if data.cache_latents were true"
    return [*lines, f"      {_gib(2 * values)} for the latents of {images:,} images{cached}"]


def _flops(flops: float) -> str:
    power = max(2, min(5, int(math.log10(max(flops, 1))) // 3))
    return f"{flops / 1000**power:.3g} {'MGTP'[power - 2]}FLOP"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _price(hours: float, machine: Machine) -> str:
    """Return the price of ``hours`` of one device, if one is given."""
    return (
        "" if machine.price is None else f", for {hours * machine.price:,.2f} at {machine.price:g} per hour and device"
    )
