"""Distributions of the noise levels in training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import Kind, config_field
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError


class NoiseLevelSampler(Kind):
    """Distribution of the noise level of a training example."""

    @property
    def includes_last(self) -> bool:
        """True if the last timestep is drawn as often as others, even if it is pure noise."""
        return False

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        """Sample the noise levels of a batch: [n] fp32 on the generator's device, within the schedule's range."""
        raise NotImplementedError

    def quantile(self, share: Tensor, schedule: Schedule) -> Tensor:
        """Return the noise levels below which shares of the samples are, [n] fp64 in (0, 1) to [n] fp32.

        Raises:
            NotImplementedError: the samples of a batch depend on each other.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(NoiseLevelSampler, kind="uniform"):
    """Independent timesteps, all equally likely (Ho et al. 2006.11239, algorithm 1)."""

    @property
    def includes_last(self) -> bool:
        return True

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        t = torch.randint(schedule.num_timesteps, (n,), generator=generator, device=generator.device)
        return schedule.sigma(t)

    def quantile(self, share: Tensor, schedule: Schedule) -> Tensor:
        return schedule.sigma((share * schedule.num_timesteps).long())


@dataclass(frozen=True)
class Antithetic(NoiseLevelSampler, kind="antithetic"):
    """Uniform, in pairs t and T - 1 - t, so that each batch has as much high as low noise and its loss varies less."""

    @property
    def includes_last(self) -> bool:
        return True

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        last, pairs = schedule.num_timesteps - 1, (n + 1) // 2
        t = torch.randint(last + 1, (pairs,), generator=generator, device=generator.device)
        return schedule.sigma(torch.cat([t, last - t])[:n])


@dataclass(frozen=True)
class Stratified(NoiseLevelSampler, kind="stratified"):
    """Uniform, one timestep from each n-th of the schedule, increasing (after Kingma et al. 2107.00630)."""

    @property
    def includes_last(self) -> bool:
        return True

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        within = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        stratum = torch.arange(n, device=generator.device)
        return schedule.sigma(((stratum + within) / n * schedule.num_timesteps).long())


@dataclass(frozen=True)
class LogNormal(NoiseLevelSampler, kind="lognormal"):
    """ln sigma ~ N(mean, std^2) (Karras et al. 2206.00364, table 1), whatever the schedule is."""

    mean: float = config_field(-1.2, "Mean of ln sigma.")
    std: float = config_field(1.2, "Standard deviation of ln sigma.")

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ConfigError(f"std is {self.std}; it must be above 0.")

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        normal = torch.randn(n, generator=generator, device=generator.device, dtype=torch.float32)
        return self._sigma(normal, schedule)

    def quantile(self, share: Tensor, schedule: Schedule) -> Tensor:
        return self._sigma(torch.special.ndtri(share), schedule).float()

    def _sigma(self, normal: Tensor, schedule: Schedule) -> Tensor:
        return (self.mean + self.std * normal).exp().clamp(schedule.sigma_min, schedule.sigma_max)


@dataclass(frozen=True)
class LogitNormal(LogNormal, kind="logit_normal"):
    """u = s / (1 + s) of flow is logit-normal: ln u / (1 - u) = ln s ~ N(mean, std^2) (SD 3, Esser et al. 2403.03206, eq. 19).

    A shift of the schedule then multiplies the levels (ibid., section 5.3.2).
    """

    mean: float = config_field(0.0, "Mean of the logit of u; above 0 for more noise.")
    std: float = config_field(1.0, "Standard deviation of the logit of u.")

    def _sigma(self, normal: Tensor, schedule: Schedule) -> Tensor:
        return super()._sigma(normal + math.log(schedule.shift) / self.std, schedule)


@dataclass(frozen=True)
class LowDiscrepancy(NoiseLevelSampler, kind="low_discrepancy"):
    """Equidistant shares of a distribution with one random offset, in random order (Kingma et al. 2107.00630).

    The batch of all devices is divided so, or that of each without ``trainer.shared_draws``. Each sample has the distribution by
    itself, and the loss of a batch varies less.
    """

    distribution: NoiseLevelSampler = config_field(
        Uniform(), "Distribution of each sample, such as uniform, lognormal or logit_normal."
    )

    @property
    def includes_last(self) -> bool:
        return self.distribution.includes_last

    def __post_init__(self) -> None:
        if type(self.distribution).quantile is NoiseLevelSampler.quantile:
            independent = [name for name, kind in self.kinds.items() if kind.quantile is not NoiseLevelSampler.quantile]
            raise ConfigError(
                f"low_discrepancy cannot have the distribution {self.distribution.kind}, whose samples depend on each other; "
                f"choose one of {', '.join(independent)}."
            )

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
        # in random order, so that each device has low and high levels
        order = torch.randperm(n, generator=generator, device=generator.device)
        share = (order + offset) / n
        return self.distribution.quantile(share.clamp(1e-12, 1 - 1e-12), schedule)
