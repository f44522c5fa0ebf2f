"""Parametrizations: what the network predicts, as a table of scalings with one row each.

The network F receives an input of about unit variance and predicts, for example, the noise; the denoiser D around it
returns an estimate of the clean image (Karras et al. 2206.00364, equation 7):

    D(x, s) = skip(s) x + out(s) F(inp(s) x, noise(s), conditioning),    x = x0 + s n,  n ~ N(0, 1)

Solving D = x0 for F gives the training target of F. For small s that formula is a small difference of large numbers, so
each row states its target in closed form.

        skip            out                inp              noise           target
eps     1               -s                 1/sqrt(1+s^2)    t(s)            n
v       1/(1+s^2)       -s/sqrt(1+s^2)     1/sqrt(1+s^2)    t(s)            (n - s x0)/sqrt(1+s^2)
x0      0               1                  1/sqrt(1+s^2)    t(s)            x0
flow    1/(1+s)         -s/(1+s)           1/(1+s)          1000 s/(1+s)    n - x0
edm     d^2/(s^2+d^2)   s d/sqrt(s^2+d^2)  1/sqrt(s^2+d^2)  ln(s)/4         (s x0 - d^2 n)/(d sqrt(s^2+d^2))
edm_v   d^2/(s^2+d^2)  -s d/sqrt(s^2+d^2)  1/sqrt(s^2+d^2)  ln(s)/4         (d^2 n - s x0)/(d sqrt(s^2+d^2))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ldm.config import Kind, config_field
from ldm.diffusion.schedule import BetaSchedule, ScaledLinear, Schedule
from ldm.errors import ConfigError

C = TypeVar("C")


class Scalings(NamedTuple):
    """Factors of one row, each of the shape of sigma."""

    skip: Tensor
    out: Tensor
    inp: Tensor


class Parametrization(Kind):
    """Row of the table. The shapes of sigma, x0 and noise only need to broadcast."""

    sigma_data: float = 1.0
    """Standard deviation of the clean data assumed by the row; latents are normalised to 1."""

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return skip, out and inp at noise levels above 0."""
        raise NotImplementedError

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return the F for which D(x0 + sigma noise, sigma) equals x0."""
        raise NotImplementedError

    def noise_level(self, sigma: Tensor, schedule: Schedule) -> Tensor:
        """Return the noise level in the form that F embeds, of the shape of sigma; by default the fractional timestep."""
        return schedule.t(sigma)


@dataclass(frozen=True)
class Eps(Parametrization, kind="eps"):
    """F predicts the noise n (Ho et al. 2006.11239)."""

    def scalings(self, sigma: Tensor) -> Scalings:
        return Scalings(skip=torch.ones_like(sigma), out=-sigma, inp=_unit_variance(sigma))

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise


@dataclass(frozen=True)
class V(Parametrization, kind="v"):
    """F predicts the velocity v = sqrt(abar) n - sqrt(1 - abar) x0 (Salimans & Ho 2202.00512)."""

    def scalings(self, sigma: Tensor) -> Scalings:
        inp = _unit_variance(sigma)
        return Scalings(skip=inp**2, out=-sigma * inp, inp=inp)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return (noise - sigma * x0) * _unit_variance(sigma)


@dataclass(frozen=True)
class X0(Parametrization, kind="x0"):
    """F predicts the clean image."""

    def scalings(self, sigma: Tensor) -> Scalings:
        return Scalings(skip=torch.zeros_like(sigma), out=torch.ones_like(sigma), inp=_unit_variance(sigma))

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return x0


@dataclass(frozen=True)
class Flow(Parametrization, kind="flow"):
    """F predicts the velocity n - x0 of the straight path (1 - u) x0 + u n (Liu et al. 2209.03003)."""

    def scalings(self, sigma: Tensor) -> Scalings:
        inp = 1 / (1 + sigma)
        return Scalings(skip=inp, out=-sigma * inp, inp=inp)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def noise_level(self, sigma: Tensor, schedule: Schedule) -> Tensor:
        """1000 u with u = s / (1 + s), independent of the schedule's shift."""
        return 1000 * sigma / (1 + sigma)


@dataclass(frozen=True)
class Edm(Parametrization, kind="edm"):
    """F predicts a combination of image and noise of unit variance (Karras et al. 2206.00364, table 1)."""

    sigma_data: float = config_field(0.5, "Standard deviation of the data; 1 for normalised latents.")

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise ConfigError(f"sigma_data is {self.sigma_data}; it must be above 0.")

    def scalings(self, sigma: Tensor) -> Scalings:
        inp = (sigma**2 + self.sigma_data**2).rsqrt()
        return Scalings(skip=(self.sigma_data * inp) ** 2, out=sigma * self.sigma_data * inp, inp=inp)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        d = self.sigma_data
        return (sigma * x0 - d**2 * noise) / d * (sigma**2 + d**2).rsqrt()

    def noise_level(self, sigma: Tensor, schedule: Schedule) -> Tensor:
        """ln(s) / 4"""
        return sigma.log() / 4


@dataclass(frozen=True)
class EdmV(Edm, kind="edm_v"):
    """F predicts the velocity, edm with the opposite sign (CosXL); v with another noise level if sigma_data is 1."""

    def scalings(self, sigma: Tensor) -> Scalings:
        edm = super().scalings(sigma)
        return edm._replace(out=-edm.out)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return -super().target(x0, noise, sigma)


@dataclass(frozen=True)
class Diffusion:
    """Schedule and parametrization of a network, as used by loss, samplers and files."""

    schedule: Schedule = config_field(ScaledLinear(), "Noise schedule of training.")
    parametrization: Parametrization = config_field(Eps(), "What the network predicts.")

    def __post_init__(self) -> None:
        zero_terminal_snr = isinstance(self.schedule, BetaSchedule) and self.schedule.zero_terminal_snr
        if zero_terminal_snr and isinstance(self.parametrization, Eps):
            raise ConfigError(
                "zero_terminal_snr cannot be used with the parametrization eps, because in pure noise the predicted "
                "noise contains no information about the image; choose v."
            )

    def model_output(
        self, network: Callable[[Tensor, Tensor, C], Tensor], x: Tensor, sigma: Tensor, conditioning: C
    ) -> Tensor:
        """Evaluate the network: F(inp(sigma) x, noise(sigma), conditioning).

        Args:
            network: F, called with images [b ...], noise levels [b] and a conditioning; may return any precision.
            x: noisy images x0 + sigma n, [b ...] fp32.
            sigma: their noise levels, [b], above 0.
            conditioning: passed to the network.

        Returns:
            The output of the network, of the shape and dtype of x.
        """
        inp = self.parametrization.scalings(per_item(sigma, x)).inp
        noise_level = self.parametrization.noise_level(sigma, self.schedule)
        return network(inp * x, noise_level, conditioning).to(x.dtype)

    def denoise(
        self, network: Callable[[Tensor, Tensor, C], Tensor], x: Tensor, sigma: Tensor, conditioning: C
    ) -> Tensor:
        """Return D(x, sigma), the estimate of the clean image, of the shape and dtype of x. See :meth:`model_output`."""
        skip, out, _ = self.parametrization.scalings(per_item(sigma, x))
        return skip * x + out * self.model_output(network, x, sigma, conditioning)

    def start(self, noise: Tensor, sigma: float) -> Tensor:
        """Return the x of level ``sigma`` from which sampling starts, such that the network's input is the unit noise itself.

        For large sigma this is ``sigma noise``; for small sigma it has the variance of a noisy image.
        """
        return noise / self.parametrization.scalings(noise.new_tensor(sigma)).inp

    def finish(self, x: Tensor, sigma: float) -> Tensor:
        """Return the image in an x of final level ``sigma``: x / sqrt(1 + sigma^2), which is x itself at 0."""
        return x / math.sqrt(1 + sigma**2)


def per_item(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshape sigma [b] to [b 1 ... 1], to broadcast against x [b ...]."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def _unit_variance(sigma: Tensor) -> Tensor:
    """1 / sqrt(1 + s^2): scales x0 + s n to unit variance if x0 has it; equals sqrt(abar)."""
    return (1 + sigma**2).rsqrt()
