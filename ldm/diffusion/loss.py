"""The loss of denoising: how far F is from its target, at a drawn noise level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ldm.config import config_field
from ldm.diffusion.noise_level_samplers import NoiseLevelSampler, Uniform
from ldm.diffusion.parametrization import Diffusion, Parametrization, per_item
from ldm.errors import ConfigError

C = TypeVar("C")

NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda answer, target: (answer - target).abs(),
    "l2": lambda answer, target: (answer - target) ** 2,
    "huber": lambda answer, target: functional.huber_loss(answer, target, reduction="none"),
}
"""Elementwise distances; huber is quadratic up to 1 and linear beyond."""


@dataclass(frozen=True)
class DenoisingLoss:
    """w(s) |F - target|, the mean over an image, at a drawn noise level s (Ho et al. 2006.11239, eq. 14)."""

    norm: Literal["l1", "l2", "huber"] = config_field("l2", "Distance between what F says and its target.")
    weighting: Literal["none", "min_snr"] = config_field(
        "none",
        "min_snr weighs the error of x0 by min(SNR, gamma) (Hang et al. 2303.09556); none does not weigh.",
    )
    gamma: float = config_field(5.0, "Greatest signal-to-noise ratio that min_snr counts.")
    noise_level_sampler: NoiseLevelSampler = config_field(
        Uniform(), "Distribution of the noise levels.", formerly="draw"
    )

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ConfigError(f"gamma is {self.gamma}; it must be above 0.")

    def __call__(
        self,
        network: Callable[[Tensor, Tensor, C], Tensor],
        diffusion: Diffusion,
        x0: Tensor,
        conditioning: C,
        generator: torch.Generator | None = None,
        *,
        sigma: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of each image at a noise level each.

        Args:
            network: F, called as by :meth:`Diffusion.model_output`.
            diffusion: schedule and parametrization.
            x0: clean images or latents, [b ...] fp32.
            conditioning: handed to the network.
            generator: source of noise levels and noise, in this order; needed unless both are given.
            sigma: noise levels [b], for a validation that measures the same each time.
            noise: unit Gaussian noise of the shape of x0, likewise.

        Returns:
            loss [b], with gradients, and sigma [b], to report the loss by noise level.
        """
        if sigma is None:
            assert generator is not None, "draw the noise levels from a generator, or give them"
            sigma = self.noise_level_sampler.sample(len(x0), diffusion.schedule, generator)
        if noise is None:
            assert generator is not None, "draw the noise from a generator, or give it"
            noise = torch.randn(x0.shape, generator=generator, device=generator.device)
        sigma, noise = sigma.to(x0), noise.to(x0)
        level = per_item(sigma, x0)
        answer = diffusion.model_output(network, x0 + level * noise, sigma, conditioning)
        target = diffusion.parametrization.target(x0, noise, level)
        loss = NORMS[self.norm](answer, target).flatten(1).mean(1)
        if self.weighting == "min_snr":
            loss = min_snr_weight(diffusion.parametrization, sigma, self.gamma) * loss
        return loss, sigma


def min_snr_weight(parametrization: Parametrization, sigma: Tensor, gamma: float) -> Tensor:
    """The weight [b] on the error of F that puts min(SNR, gamma) on that of x0 (Hang et al. 2303.09556).

    Since D - x0 = out(s) (F - target), in units of the data's standard deviation d,

        min(SNR, gamma) |D - x0|^2 / d^2 = min(SNR, gamma) (out(s) / d)^2 |F - target|^2,    SNR = (d / s)^2

    which is min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v and edm, min(SNR, gamma) for x0.
    The norms that are no squares take the same weight.
    """
    d = parametrization.sigma_data
    return ((d / sigma) ** 2).clamp(max=gamma) * (parametrization.scalings(sigma).out / d) ** 2
