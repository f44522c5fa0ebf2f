"""Noise schedules: tables of noise levels, one for each timestep.

A noisy image is ``x = x0 + sigma n`` with ``n ~ N(0, 1)``. The variance-preserving form of DDPM,
``x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n``, is the same image times ``sqrt(abar_t)``, with

    sigma_t = sqrt((1 - abar_t) / abar_t),    abar_t = prod_{i <= t} (1 - beta_i) = 1 / (1 + sigma_t^2).

A schedule is therefore a table whose row ``t`` is the noise level of timestep ``t``; fractional timesteps are interpolated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm.config import Kind, config_field
from ldm.errors import ConfigError

SIGMA_LIMIT = 4096.0
"""Largest noise level, used in place of infinity for pure noise; abar is then 2^-24, the smallest positive fp16 number."""


class Schedule(Kind):
    """Increasing table of noise levels, and the map between timesteps and noise levels that it defines."""

    num_timesteps: int
    shift: float = 1.0
    """Factor on the noise levels, in training and sampling."""

    @property
    def pure_noise(self) -> str | None:
        """Name of the setting by which the last timestep is pure noise; None if it is not."""
        return None

    def levels(self) -> Tensor:
        """Return the noise level of each timestep: [num_timesteps] fp64 on the CPU, increasing; the last may be infinite."""
        raise NotImplementedError

    @cached_property
    def table(self) -> Tensor:
        """:meth:`levels`, clamped to ``SIGMA_LIMIT``."""
        return self.levels().clamp(max=SIGMA_LIMIT)

    @property
    def sigma_min(self) -> float:
        """The noise level of timestep 0."""
        return float(self.table[0])

    @property
    def sigma_max(self) -> float:
        """The noise level of the last timestep."""
        return float(self.table[-1])

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar of each timestep, [num_timesteps] fp64: the fraction of the variance of ``x_t`` that is signal."""
        return 1 / (1 + self.table**2)

    def sigma(self, t: Tensor) -> Tensor:
        """Map timesteps (any shape, clamped to the table) to noise levels, linear in ln sigma between rows."""
        rows = torch.arange(self.num_timesteps, device="cpu")
        return interpolate(t, rows, self.table.log()).exp().to(_float_dtype(t))

    def t(self, sigma: Tensor) -> Tensor:
        """Map noise levels (any shape, clamped to the table) to fractional timesteps; the inverse of :meth:`sigma`."""
        rows = torch.arange(self.num_timesteps, device="cpu")
        return interpolate(sigma.log(), self.table.log(), rows).to(_float_dtype(sigma))


@dataclass(frozen=True)
class BetaSchedule(Schedule):
    """Schedule given by the variances beta_t of the steps ``x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) n``."""

    num_timesteps: int = config_field(1000, "Number of timesteps T of the forward process.")
    zero_terminal_snr: bool = config_field(
        False, "Rescale the table so that its last row is pure noise (Lin et al. 2305.08891); not for eps."
    )

    def __post_init__(self) -> None:
        if self.num_timesteps < 2:
            raise ConfigError(f"num_timesteps is {self.num_timesteps}; a schedule needs at least 2.")

    @property
    def pure_noise(self) -> str | None:
        return "zero_terminal_snr" if self.zero_terminal_snr else None

    @property
    def betas(self) -> Tensor:
        """beta of each timestep, [num_timesteps] fp64, before ``zero_terminal_snr`` is applied."""
        raise NotImplementedError

    def levels(self) -> Tensor:
        """sqrt((1 - abar) / abar)"""
        alphas_cumprod = (1 - self.betas).cumprod(0)
        if self.zero_terminal_snr:
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


@dataclass(frozen=True)
class _BetaRange(BetaSchedule):
    """Base of the schedules that run from ``beta_start`` to ``beta_end``."""

    beta_start: float = config_field(1e-4, "beta of the first timestep.")
    beta_end: float = config_field(0.02, "beta of the last timestep.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} are out of range; "
                "they must satisfy 0 < beta_start <= beta_end < 1."
            )


@dataclass(frozen=True)
class Linear(_BetaRange, kind="linear"):
    """beta increases linearly (Ho et al. 2006.11239, section 4)."""

    @property
    def betas(self) -> Tensor:
        return _linspace(self.beta_start, self.beta_end, self.num_timesteps)


@dataclass(frozen=True)
class ScaledLinear(_BetaRange, kind="scaled_linear"):
    """sqrt(beta) increases linearly (latent diffusion, Rombach et al. 2112.10752; Stable Diffusion)."""

    beta_start: float = config_field(0.00085, "beta of the first timestep.")
    beta_end: float = config_field(0.012, "beta of the last timestep.")

    @property
    def betas(self) -> Tensor:
        return _linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.num_timesteps) ** 2


@dataclass(frozen=True)
class Sigmoid(_BetaRange, kind="sigmoid"):
    """beta follows a sigmoid from -6 to 6, flat at both ends (GeoDiff, Xu et al. 2203.02923)."""

    @property
    def betas(self) -> Tensor:
        ramp = _linspace(-6, 6, self.num_timesteps).sigmoid()
        return self.beta_start + ramp * (self.beta_end - self.beta_start)


@dataclass(frozen=True)
class Cosine(BetaSchedule, kind="cosine"):
    """abar follows a squared cosine, with beta clipped to 0.999 (Nichol & Dhariwal 2102.09672, equation 17)."""

    @property
    def betas(self) -> Tensor:
        time = _linspace(0, 1, self.num_timesteps + 1)
        alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


@dataclass(frozen=True)
class Flow(Schedule, kind="flow"):
    """The straight path x_u = (1 - u) x0 + u n (Liu et al. 2209.03003): sigma = u / (1 - u), u = (t + 1) / T.

    A shift multiplies sigma (Esser et al. 2403.03206, section 5.3.2): larger images need more noise to lose the same detail.
    """

    num_timesteps: int = config_field(1000, "Number of rows of the table; the last is u = 1, pure noise.")
    shift: float = config_field(1.0, "Factor on every noise level; SD 3 uses 3 for images of one megapixel.")

    def __post_init__(self) -> None:
        if self.num_timesteps < 2 or self.shift <= 0:
            raise ConfigError(f"num_timesteps {self.num_timesteps} must be at least 2 and shift {self.shift} above 0.")

    @property
    def pure_noise(self) -> str | None:
        return "the schedule flow"

    def levels(self) -> Tensor:
        """shift u / (1 - u)"""
        u = _linspace(1 / self.num_timesteps, 1, self.num_timesteps)
        return self.shift * u / (1 - u)


@dataclass(frozen=True)
class Karras(Schedule, kind="karras"):
    """sigma^(1/rho) increases linearly (EDM, Karras et al. 2206.00364, equation 5)."""

    num_timesteps: int = config_field(1000, "Number of rows of the table.")
    sigma_min: float = config_field(0.002, "Smallest noise level.")
    sigma_max: float = config_field(80.0, "Largest noise level, at most 4096.")
    rho: float = config_field(7.0, "Concentration of the rows at low noise; 1 spaces them evenly.")

    def __post_init__(self) -> None:
        if self.num_timesteps < 2 or not 0 < self.sigma_min < self.sigma_max <= SIGMA_LIMIT or self.rho <= 0:
            raise ConfigError(
                f"num_timesteps {self.num_timesteps} must be at least 2, rho {self.rho} above 0, "
                f"and sigma_min {self.sigma_min} and sigma_max {self.sigma_max} must satisfy "
                f"0 < sigma_min < sigma_max <= {SIGMA_LIMIT:g}."
            )

    def levels(self) -> Tensor:
        """Equation 5, in increasing order."""
        return karras_levels(self.sigma_max, self.sigma_min, self.rho, self.num_timesteps).flip(0)


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that the last value is 0 and the first unchanged (Lin et al. 2305.08891, algorithm 1)."""
    signal = alphas_cumprod.sqrt()
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2


def karras_levels(sigma_max: float, sigma_min: float, rho: float, n: int) -> Tensor:
    """(sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, [n] fp64, decreasing."""
    return _linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho


def _linspace(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")


def interpolate(x: Tensor, xp: Tensor, fp: Tensor) -> Tensor:
    """Evaluate the piecewise linear function through (xp, fp), constant outside of its range; fp64, on the device of x."""
    precision = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no fp64
    x, xp, fp = (values.to(x.device, precision) for values in (x, xp, fp))
    right = torch.searchsorted(xp, x).clamp(1, len(xp) - 1)
    weight = ((x - xp[right - 1]) / (xp[right] - xp[right - 1])).clamp(0, 1)
    return torch.lerp(fp[right - 1], fp[right], weight)


def _float_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float32
