"""Config sections that all stages share: how a stage is trained, and on which machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ldm.config import config_field
from ldm.devices import default_device, default_dtype
from ldm.errors import ConfigError
from ldm.nn.power_profiles import LONGEST
from ldm.training.learning_rate import Constant, LearningRateDecay
from ldm.training.loggers import LoggerConfig
from ldm.training.loggers.tensorboard import TensorBoardConfig
from ldm.training.optimizers import OptimizerConfig
from ldm.training.optimizers.adamw import AdamWConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class EMASnapshotsConfig:
    """Stored averages with power-function profiles (Karras et al. 2024, arXiv 2312.02696, section 3).

    The length of an average is the standard deviation of its profile as a share of the steps so far.
    """

    lengths: tuple[float, ...] = config_field((0.05, 0.1), "lengths of the averages that are stored")
    every: int = config_field(1000, "steps between snapshots", changeable=True)

    def __post_init__(self) -> None:
        distinct = len(set(self.lengths)) == len(self.lengths) > 0
        if not distinct or not all(0 < each < LONGEST for each in self.lengths) or self.every < 1:
            raise ConfigError(
                f"lengths {list(self.lengths)} must be different numbers above 0 and below {LONGEST:.4f}, at least one, and "
                f"every {self.every} at least 1."
            )


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of the training of one stage."""

    max_steps: int = config_field(help="optimizer steps", changeable=True)
    batch_size: int = config_field(help="images per step and device, before accumulation", changeable=True)
    learning_rate: float = config_field(help="peak learning rate, reached after warm-up", changeable=True)
    accumulate: int = config_field(1, "batches whose gradients are averaged before a step", changeable=True)
    optimizer: OptimizerConfig = config_field(
        AdamWConfig(), "optimizer; another kind starts with a new training, since the state of each is its own"
    )
    betas: tuple[float, float] = config_field((0.9, 0.999), "Adam betas (beta1, beta2)", changeable=True)
    weight_decay: float = config_field(
        0.01, "weight decay, decoupled as in AdamW, of all parameters but biases and scales", changeable=True
    )
    warmup_steps: int = config_field(0, "steps over which the learning rate rises linearly from 0", changeable=True)
    decay: LearningRateDecay = config_field(Constant(), "learning-rate schedule after warm-up", changeable=True)
    gradient_clip: float | None = config_field(
        1.0, "gradients are scaled down to this norm; null = no clipping", changeable=True
    )
    ema_decay: float = config_field(
        0.9999,
        "decay of the averaged weights (EMA), ramped as (1 + n) / (10 + n) at step n; 0 = no averaging",
        changeable=True,
    )
    ema_snapshots: EMASnapshotsConfig | None = config_field(
        None, "store averaged weights, from which averages of any length are made after the training; null = none"
    )
    precision: Precision | None = config_field(
        None,
        "autocast precision of this stage; null = trainer.precision",
        changeable=True,
    )
    gradient_checkpointing: bool = config_field(
        False,
        "compute the activations of each block again in the backward pass instead of keeping them: less memory, about a "
        "third more computation",
        changeable=True,
    )
    log_every: int = config_field(50, "steps between rows of metrics.csv", changeable=True)
    validate_every: int = config_field(1000, "steps between validations", changeable=True)
    images_every: int = config_field(1000, "steps between grids of images", formerly="pictures_every", changeable=True)
    checkpoint_every: int = config_field(500, "steps between checkpoints", changeable=True)
    keep_checkpoints: int = config_field(
        2,
        "number of newest checkpoints to keep: last.ckpt, and step_<number>.ckpt before it; wsd keeps one more",
        changeable=True,
    )
    init: str | None = config_field(
        None,
        "source of the initial weights: the file of a stage or a run, or SD as a file, a folder or a hub id",
        path=True,
    )

    def __post_init__(self) -> None:
        counts = (
            "max_steps",
            "batch_size",
            "accumulate",
            "log_every",
            "validate_every",
            "images_every",
            "checkpoint_every",
            "keep_checkpoints",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.ema_decay < 1 or self.warmup_steps < 0:
            raise ConfigError("learning_rate must be above 0 and finite, ema_decay in [0, 1), warmup_steps at least 0.")
        clips = self.gradient_clip is None or self.gradient_clip > 0
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 <= self.weight_decay < math.inf or not clips:
            raise ConfigError(
                "betas must be in [0, 1), weight_decay at least 0, gradient_clip above 0 (null for none)."
            )

    def learning_rate_factor(self, step: int) -> float:
        """Return the factor on the learning rate at ``step`` (from 0), in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        return self.decay.factor(done)

    @property
    def stable_steps(self) -> int | None:
        """Number of steps before a final decay, whose learning rates do not depend on ``max_steps``; None if there is none."""
        share, after = self.decay.stable_share, max(0, self.max_steps - self.warmup_steps)
        return None if share is None else self.warmup_steps + 1 + int(share * after)


@dataclass(frozen=True)
class TrainerConfig:
    """Machine settings that all stages share."""

    accelerator: str = config_field("auto", "Lightning accelerator: auto, cpu, gpu, ...")
    devices: int | Literal["auto"] = config_field(
        "auto", "devices of a machine; auto = as many as torchrun or SLURM starts processes on it, else all GPUs"
    )
    num_nodes: int | Literal["auto"] = config_field(
        "auto", "machines; auto = as many as torchrun or SLURM starts processes on, else 1"
    )
    strategy: str = config_field(
        "auto",
        "how several devices share the training: ddp, fsdp2 (weights, averages and optimizer states are sharded), or another "
        "strategy of Lightning; auto = ddp",
    )
    shared_draws: bool = config_field(
        True,
        "each device draws the random numbers of the batch of all devices and uses its part, so that a training does not depend "
        "on their number, except for dropout, token routing and patch dropout; false = each draws its own, which saves time with "
        "very many devices",
    )
    precision: Precision = config_field(
        "auto", "autocast precision of the networks; auto = bf16 where the hardware supports it natively, else fp32"
    )
    compile: bool = config_field(False, "torch.compile the networks; worthwhile for long trainings")
    loggers: tuple[LoggerConfig, ...] = config_field(
        (TensorBoardConfig(),), "where metrics are written in addition to metrics.csv"
    )
    threads: int | None = config_field(None, "CPU threads; null = one for each core that other processes leave idle")

    def __post_init__(self) -> None:
        twice = sorted(
            {each.kind for each in self.loggers if sum(other.kind == each.kind for other in self.loggers) > 1}
        )
        if twice:
            raise ConfigError(
                f"loggers contains the kind {twice[0]} more than once, which would share its files; remove one."
            )

    def precision_of(self, train: TrainConfig) -> str:
        """Return fp32, bf16 or fp16 for a stage; ``auto`` is resolved for this machine."""
        precision = train.precision or self.precision
        if precision != "auto":
            return precision
        device = torch.device("cpu") if self.accelerator == "cpu" else default_device()
        return "bf16" if default_dtype(device) == torch.bfloat16 else "fp32"
