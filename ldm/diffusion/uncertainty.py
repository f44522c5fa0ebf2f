"""Learned weighting of the denoising loss by its expected size at each noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.config import config_field
from ldm.diffusion.loss import WeightedLoss, WeightedLossConfig
from ldm.diffusion.parametrization import Diffusion
from ldm.errors import ConfigError


@dataclass(frozen=True)
class UncertaintyLossConfig(WeightedLossConfig, kind="uncertainty"):
    """exp(-u(s)) L(s) + u(s); L is the loss of kind `weighted`, u(s) learns ln E[L(s)] (Karras et al. 2312.02696, eq. 21).

    All noise levels then contribute gradients of similar size, whatever the scale of their losses.
    """

    channels: int = config_field(128, "Number of Fourier features of the noise level that u is a linear function of.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1:
            raise ConfigError(f"channels is {self.channels}; it must be at least 1.")

    def build(self) -> UncertaintyLoss:
        return UncertaintyLoss(self)


class UncertaintyLoss(WeightedLoss):
    """The loss of an :class:`UncertaintyLossConfig`; u is 0 before training."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, config: UncertaintyLossConfig):
        super().__init__(config)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(config.channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(config.channels))
        self.weight = nn.Parameter(torch.zeros(config.channels))

    def uncertainty(self, sigma: Tensor) -> Tensor:
        """Return u of noise levels ``[b]``: linear in sqrt(2) cos(f ln(s) / 4 + p), f ~ 2 pi N(0, 1), p ~ U(0, 2 pi)."""
        angles = (sigma.float().log() / 4)[:, None] * self.frequencies + self.phases
        return (math.sqrt(2) * angles.cos() * self.weight).sum(1) / math.sqrt(len(self.weight))

    def weighted(self, loss: Tensor, diffusion: Diffusion, sigma: Tensor) -> Tensor:
        """Weight the losses of a batch as :class:`WeightedLoss`, and in training also by the uncertainty."""
        loss = super().weighted(loss, diffusion, sigma)
        if not self.training:
            return loss
        u = self.uncertainty(sigma)
        return loss * torch.exp(-u) + u
