"""Optimizer and learning-rate schedule of a stage, and the settings that all stages have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ldm.config import config_field
from ldm.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained."""

    max_steps: int = config_field(help="optimizer steps")
    batch_size: int = config_field(help="pictures a step and device, before accumulation")
    learning_rate: float = config_field(help="the highest, after warm-up")
    accumulate: int = config_field(1, "batches whose gradients are averaged before a step")
    betas: tuple[float, float] = config_field((0.9, 0.999), "of Adam")
    weight_decay: float = config_field(0.01, "of AdamW, on matrices and convolutions only")
    warmup_steps: int = config_field(0, "steps over which the learning rate rises linearly from 0")
    decay: Literal["constant", "cosine", "linear"] = config_field(
        "constant", "of the learning rate after warm-up, down to 0 at max_steps"
    )
    gradient_clip: float | None = config_field(1.0, "largest norm of the gradients; null = unlimited")
    ema_decay: float = config_field(0.9999, "of the averaged weights, ramped as (1 + n) / (10 + n); 0 = no averaging")
    precision: Precision | None = config_field(
        None, "of this stage; null = trainer.precision. fp32 suits a VAE: small channels, exact colours"
    )
    log_every: int = config_field(50, "steps between rows of metrics.csv")
    validate_every: int = config_field(1000, "steps between validations")
    images_every: int = config_field(1000, "steps between grids of images", formerly="pictures_every")
    checkpoint_every: int = config_field(500, "steps between checkpoints")
    init: str | None = config_field(
        None, "source of weights to start from: what a stage or a run leaves, or SD in a file, a folder or by hub id"
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
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.learning_rate <= 0 or not 0 <= self.ema_decay < 1 or self.warmup_steps < 0:
            raise ConfigError("learning_rate must be above 0, ema_decay in [0, 1), warmup_steps at least 0.")

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rate of step number ``step`` (from 0) is multiplied with, in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        if self.decay == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0 - done if self.decay == "linear" else 1.0


def adamw(modules: Iterable[nn.Module], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over what is trainable; biases, norms and scales do not decay."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    optimizer._step_supports_amp_scaling = False  # fp16 is unscaled before it is clipped
    return optimizer
