"""Denoising loss: the weighted distance of F from its target at a random noise level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.config import Kind, config_field
from ldm.diffusion.noise_level_samplers import NoiseLevelSampler, Uniform
from ldm.diffusion.parametrization import Diffusion, Parametrization, per_item
from ldm.errors import ConfigError
from ldm.nn.ranks import draw_rows, randn_rows

C = TypeVar("C")

NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda output, target: (output - target).abs(),
    "l2": lambda output, target: (output - target) ** 2,
    "huber": lambda output, target: functional.huber_loss(output, target, reduction="none"),
}
"""Elementwise distances; huber is quadratic up to 1 and linear beyond."""


class DenoisingLossConfig(Kind, default="weighted"):
    """Family of the losses of stage 3.

    ``build()`` makes a module that is called as :meth:`WeightedLoss.forward`; its parameters are trained with the denoiser.
    In evaluation mode, a loss that learns a weighting returns the one that it weights, so that validations compare.
    """

    @property
    def features(self) -> tuple[str, ...]:
        """Modules of the denoiser whose outputs the loss takes as the argument ``features``, by their names in it."""
        return ()

    def build(self) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class WeightedLossConfig(DenoisingLossConfig, kind="weighted"):
    """w(s) |F - target|, averaged over an image, at a random noise level s (Ho et al. 2006.11239, eq. 14)."""

    norm: Literal["l1", "l2", "huber"] = config_field("l2", "Distance between the output of F and its target.")
    weighting: Literal["none", "min_snr"] = config_field(
        "none",
        "min_snr weights the error of x0 by min(SNR, gamma) (Hang et al. 2303.09556); none = 1.",
    )
    gamma: float = config_field(5.0, "Upper limit of the signal-to-noise ratio in min_snr.")
    noise_level_sampler: NoiseLevelSampler = config_field(
        Uniform(), "Distribution of the noise levels.", formerly="draw"
    )

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ConfigError(f"gamma is {self.gamma}; it must be above 0.")

    def build(self) -> WeightedLoss:
        return WeightedLoss(self)


class WeightedLoss(nn.Module):
    """The loss of a :class:`WeightedLossConfig`; it has no parameters."""

    def __init__(self, config: WeightedLossConfig):
        super().__init__()
        self.config = config

    def forward(
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
        """Return the loss of each image, each at its own noise level.

        Args:
            network: F, called as by :meth:`Diffusion.model_output`.
            diffusion: schedule and parametrization.
            x0: clean images or latents, [b ...] fp32.
            conditioning: passed to the network.
            generator: source of noise levels and noise, in this order; required unless both are given.
            sigma: noise levels [b]; a validation gives them, to be reproducible.
            noise: unit Gaussian noise of the shape of x0, likewise.

        Returns:
            loss [b], with gradients, and sigma [b], to report the loss by noise level.
        """
        if sigma is None:
            assert generator is not None, "pass a generator or noise levels"
            sampler, source = self.config.noise_level_sampler, generator
            sigma = draw_rows(lambda n: sampler.sample(n, diffusion.schedule, source), len(x0), source)
        if noise is None:
            assert generator is not None, "pass a generator or noise"
            noise = randn_rows(x0.shape, generator)
        sigma, noise = sigma.to(x0), noise.to(x0)
        level = per_item(sigma, x0)
        output = diffusion.model_output(network, x0 + level * noise, sigma, conditioning)
        target = diffusion.parametrization.target(x0, noise, level)
        loss = NORMS[self.config.norm](output, target).flatten(1).mean(1)
        return self.weighted(loss, diffusion, sigma), sigma

    def weighted(self, loss: Tensor, diffusion: Diffusion, sigma: Tensor) -> Tensor:
        """Weight the losses of a batch, ``[b]``, by their noise levels, ``[b]``."""
        if self.config.weighting == "min_snr":
            loss = min_snr_weight(diffusion.parametrization, sigma, self.config.gamma) * loss
        return loss


def min_snr_weight(parametrization: Parametrization, sigma: Tensor, gamma: float) -> Tensor:
    """Return the weight [b] on the error of F that amounts to min(SNR, gamma) on that of x0 (Hang et al. 2303.09556).

    Since D - x0 = out(s) (F - target), in units of the data's standard deviation d,

        min(SNR, gamma) |D - x0|^2 / d^2 = min(SNR, gamma) (out(s) / d)^2 |F - target|^2,    SNR = (d / s)^2

    which is min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v and edm, min(SNR, gamma) for x0.
    The other norms take the same weight.
    """
    d = parametrization.sigma_data
    return ((d / sigma) ** 2).clamp(max=gamma) * (parametrization.scalings(sigma).out / d) ** 2
