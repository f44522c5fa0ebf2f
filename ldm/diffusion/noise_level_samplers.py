"""Distributions of the noise levels in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import Kind, config_field
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError


class NoiseLevelSampler(Kind):
    """Distribution of the noise level of a training example."""

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        """Sample the noise levels of a batch: [n] fp32 on the generator's device, within the schedule's range."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(NoiseLevelSampler, kind="uniform"):
    """Independent timesteps, all equally likely (Ho et al. 2006.11239, algorithm 1)."""

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        t = torch.randint(schedule.num_timesteps, (n,), generator=generator, device=generator.device)
        return schedule.sigma(t)


@dataclass(frozen=True)
class Antithetic(NoiseLevelSampler, kind="antithetic"):
    """Uniform, in pairs t and T - 1 - t, so that each batch has as much high as low noise and its loss varies less."""

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        last, pairs = schedule.num_timesteps - 1, (n + 1) // 2
        t = torch.randint(last + 1, (pairs,), generator=generator, device=generator.device)
        return schedule.sigma(torch.cat([t, last - t])[:n])


@dataclass(frozen=True)
class Stratified(NoiseLevelSampler, kind="stratified"):
    """Uniform, one timestep from each n-th of the schedule, increasing (after Kingma et al. 2107.00630)."""

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        within = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        stratum = torch.arange(n, device=generator.device)
        return schedule.sigma(((stratum + within) / n * schedule.num_timesteps).long())


@dataclass(frozen=True)
class LogNormal(NoiseLevelSampler, kind="lognormal"):
    """ln sigma ~ N(mean, std^2) (Karras et al. 2206.00364, table 1); with flow, SD 3's logit-normal."""

    mean: float = config_field(-1.2, "Mean of ln sigma; 0 with flow.")
    std: float = config_field(1.2, "Standard deviation of ln sigma; 1 with flow.")

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ConfigError(f"std is {self.std}; it must be above 0.")

    def sample(self, n: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
        normal = torch.randn(n, generator=generator, device=generator.device, dtype=torch.float32)
        return (self.mean + self.std * normal).exp().clamp(schedule.sigma_min, schedule.sigma_max)
