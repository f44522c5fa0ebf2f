"""Denoising loss: the weighted distance of F from its target at a random noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.config import Kind, config_field
from ldm.diffusion.noise_level_samplers import NoiseLevelSampler, Uniform
from ldm.diffusion.parametrization import Diffusion, Eps, Flow, per_item
from ldm.diffusion.schedule import BetaSchedule, Schedule
from ldm.diffusion.weightings import snr_weight
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

    Class attribute ``reads_images``: whether the loss compares the denoiser with features of the clean images, so that it is
    built by :meth:`build_aligned` and takes them as the argument ``teacher``.
    """

    reads_images: ClassVar[bool] = False

    @property
    def features(self) -> tuple[str, ...]:
        """Modules of the denoiser whose outputs the loss takes as the argument ``features``, by their names in it."""
        return ()

    @property
    def image_encoder(self) -> str | None:
        """Source of the teacher of a loss that ``reads_images``; None = the image tower of stage 2 of the experiment."""
        return None

    def layer_of(self, image_encoder: nn.Module) -> int:
        """Return the block of the teacher, from 1, whose features a loss that ``reads_images`` takes.

        Raises:
            ConfigError: the teacher lacks it.
        """
        raise NotImplementedError

    def check(self, diffusion: Diffusion) -> None:
        """Check that the loss can train a network with this schedule and parametrization.

        Raises:
            ConfigError: it cannot.
        """

    @property
    def compares_samples(self) -> bool:
        """True if the loss of a sample depends on other samples of the batch, of which there must be some."""
        return False

    def build(self) -> nn.Module:
        raise NotImplementedError

    def build_aligned(self, channels: Sequence[int], image_encoder: nn.Module) -> nn.Module:
        """Build a loss that ``reads_images``.

        Args:
            channels: channels of the feature maps that :attr:`features` names.
            image_encoder: teacher, which the loss freezes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WeightedLossConfig(DenoisingLossConfig, kind="weighted"):
    """w(s) |F - target|, averaged over an image, at a random noise level s (Ho et al. 2006.11239, eq. 14)."""

    norm: Literal["l1", "l2", "huber"] = config_field("l2", "Distance between the output of F and its target.")
    weighting: Literal["none", "min_snr", "soft_min_snr"] = config_field(
        "none",
        "min_snr weights the error of x0 by min(SNR, gamma) (Hang et al. 2303.09556), soft_min_snr by SNR gamma / (SNR + gamma) "
        "(Crowson et al. 2401.11605), not with the parametrization flow; none = 1.",
    )
    gamma: float = config_field(5.0, "Upper limit of the signal-to-noise ratio in min_snr and soft_min_snr.")
    noise_level_sampler: NoiseLevelSampler = config_field(
        Uniform(), "Distribution of the noise levels.", formerly="draw"
    )
    base_resolution: int | None = config_field(
        None,
        "Side, in positions of the latent, for which the noise levels are meant: they are multiplied by the side of the image "
        "(the square root of its number of positions) divided by this (Hoogeboom et al. 2301.11093; Esser et al. 2403.03206, "
        "eq. 23); null = the same levels for all sizes.",
    )
    offset_noise: float = config_field(
        0.0,
        "Standard deviation of noise that is added to all positions of a channel alike, so that the mean of an image is "
        "learned (Guttenberg 2023); 0.1 is usual.",
    )
    input_perturbation: float = config_field(
        0.0,
        "Standard deviation, in units of the noise, of more noise in the input of the network but not in its target (Ning et "
        "al. 2301.11706, algorithm 2); 0.1 is usual.",
    )

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ConfigError(f"gamma is {self.gamma}; it must be above 0.")
        if self.base_resolution is not None and self.base_resolution < 1:
            raise ConfigError(f"base_resolution is {self.base_resolution}; it must be at least 1, or null.")
        if not 0 <= self.offset_noise < math.inf or not 0 <= self.input_perturbation < math.inf:
            raise ConfigError(
                f"offset_noise is {self.offset_noise} and input_perturbation {self.input_perturbation}; both must be at least 0 "
                "and finite."
            )

    def check(self, diffusion: Diffusion) -> None:
        schedule = diffusion.schedule
        zero_terminal_snr = isinstance(schedule, BetaSchedule) and schedule.zero_terminal_snr
        if isinstance(diffusion.parametrization, Flow) and self.weighting != "none":
            raise ConfigError(
                f"the weighting {self.weighting} cannot be used with the parametrization flow, which weights noise levels by how "
                "often they are drawn; choose none, and a noise_level_sampler such as logit_normal."
            )
        if schedule.pure_noise and isinstance(diffusion.parametrization, Eps):
            raise ConfigError(
                f"the parametrization eps cannot be trained with {schedule.pure_noise}, because in pure noise the predicted "
                "noise contains no information about the image; choose flow or v."
            )
        if schedule.pure_noise and self.weighting != "none":
            raise ConfigError(
                f"the weighting {self.weighting} cannot be used with {schedule.pure_noise}, because its weight is 0 in pure "
                "noise, which the network would not learn; choose none."
            )
        if zero_terminal_snr and not self.noise_level_sampler.includes_last:
            others = [name for name, kind in self.noise_level_sampler.kinds.items() if kind().includes_last]
            raise ConfigError(
                f"the noise_level_sampler {self.noise_level_sampler.kind} cannot be used with zero_terminal_snr, because it "
                f"never draws pure noise, with which sampling begins; choose one of {', '.join(others)}."
            )
        if zero_terminal_snr and self.base_resolution is not None:
            raise ConfigError(
                "base_resolution cannot be used with zero_terminal_snr, because small images would never be trained with pure "
                "noise, with which sampling begins; choose null."
            )

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
        features: Mapping[str, Tensor] | None = None,
        teacher: Tensor | None = None,
        self_condition: Callable[[Tensor, Tensor, C], C] | None = None,
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
            features: outputs of the modules ``features`` of the config by their names, filled by the network; None = without
                :meth:`feature_term`.
            teacher: features ``[b z h w]`` of the clean images, for a loss that ``reads_images``.
            self_condition: given the noisy images, their noise levels and the conditioning, returns the conditioning with an
                estimate of x0; None = it is passed to the network as it is.

        Returns:
            loss [b], with gradients, and sigma [b], to report the loss by noise level.
        """
        if sigma is None:
            assert generator is not None, "pass a generator or noise levels"
            sampler, source = self.config.noise_level_sampler, generator
            sigma = draw_rows(lambda n: sampler.sample(n, diffusion.schedule, source), len(x0), source)
            sigma = self._shifted(sigma, x0.shape, diffusion.schedule)
        perturbation: Tensor | float = 0.0
        if noise is None:
            assert generator is not None, "pass a generator or noise"
            noise = self._noise(x0.shape, generator)
            if self.config.input_perturbation:
                perturbation = self.config.input_perturbation * randn_rows(x0.shape, generator).to(x0)
        sigma, noise = sigma.to(x0), noise.to(x0)
        level = per_item(sigma, x0)
        x = x0 + level * (noise + perturbation)
        if self_condition is not None:
            conditioning = self_condition(x, sigma, conditioning)
        output = diffusion.model_output(network, x, sigma, conditioning)
        target = diffusion.parametrization.target(x0, noise, level)
        loss = self.weighted(self.distance(output, target), diffusion, sigma)
        if self.training and features is not None:
            loss = loss + self.feature_term(features, teacher)
        return loss, sigma

    def feature_term(self, features: Mapping[str, Tensor], teacher: Tensor | None) -> Tensor | float:
        """Return what the loss of each image ``[b]``, or of all, has in addition in training; see :meth:`forward`."""
        return 0.0

    def _shifted(self, sigma: Tensor, shape: torch.Size, schedule: Schedule) -> Tensor:
        """Return the noise levels for images of a shape [b c ...]; see ``base_resolution``."""
        if self.config.base_resolution is None:
            return sigma
        side = math.sqrt(math.prod(shape[2:]))
        return (sigma * (side / self.config.base_resolution)).clamp(schedule.sigma_min, schedule.sigma_max)

    def _noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        noise = randn_rows(shape, generator)
        if self.config.offset_noise:
            offset = randn_rows(torch.Size((*shape[:2], *[1] * len(shape[2:]))), generator)
            noise = noise + self.config.offset_noise * offset
        return noise

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean distance ``[b]`` of outputs of F from their targets, ``[b ...]``."""
        return NORMS[self.config.norm](output, target).flatten(1).mean(1)

    def weighted(self, loss: Tensor, diffusion: Diffusion, sigma: Tensor) -> Tensor:
        """Weight the losses of a batch, ``[b]``, by their noise levels, ``[b]``."""
        if self.config.weighting != "none":
            loss = snr_weight(self.config.weighting, diffusion.parametrization, sigma, self.config.gamma) * loss
        return loss
