"""Solvers: from noise to a picture, by a denoiser, along a falling grid of noise levels.

A denoiser gives D(x, s), the expected clean picture behind x = x0 + s n, and so the score. A sample follows

    dx/ds = (x - D(x, s)) / s                     (Karras et al. 2206.00364, equations 1 and 3)

from large s down to 0, or a stochastic process with the same marginals. Each solver is a generator that keeps
its state in locals and yields a :class:`Step` for each interval of the grid; the caller owns the loop:

    for step in euler(denoise, x, sigmas):
        x = step.x

Where D stays the same, the equation is solved exactly by x' = D + s'/s (x - D), a straight line towards D.
Most solvers are this step, with a better D in it or with noise after it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Noisy x [b ...] and its noise levels sigma [b], above 0, to an estimate of the clean x0 [b ...]."""

Noise = Callable[[float, float], Tensor]
"""(sigma, sigma_next) of a step to the unit Gaussian noise, of the shape of x, that the step adds."""


@dataclass(frozen=True)
class Step:
    """What a solver yields after each interval of the grid."""

    index: int
    """Which interval, from 0."""
    sigma: float
    """The noise level that x has now, ``sigmas[index + 1]``."""
    x: Tensor
    """The sample after the step."""
    denoised: Tensor
    """D at the start of the step: the picture as seen from there."""


@dataclass(frozen=True)
class SamplerSpec:
    """What there is to know of a solver without running it."""

    order: int
    """Order of convergence: halving the steps' length divides the error by 2^order."""
    evaluations: int
    """Calls of the denoiser in a step (the step to 0 may take fewer)."""
    stochastic: bool
    """Whether it takes ``noise``."""
    options: tuple[str, ...]
    """Names of its further parameters."""


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {}
"""Solvers by name. Each takes ``denoise``, a starting ``x`` [b ...] of noise level ``sigmas[0]``, falling
``sigmas`` [n + 1] of which only the last may be 0, ``noise`` if it is stochastic, and its options."""

SPECS: dict[str, SamplerSpec] = {}
"""The same names to their :class:`SamplerSpec`."""

Solver = TypeVar("Solver", bound=Callable[..., Iterator[Step]])


def sampler(order: int, evaluations: int = 1) -> Callable[[Solver], Solver]:
    """Enter a solver in ``SAMPLERS`` and ``SPECS``; what else there is to know is read from its signature."""

    def register(solver: Solver) -> Solver:
        parameters = list(inspect.signature(solver).parameters)
        options = tuple(name for name in parameters if name not in ("denoise", "x", "sigmas", "noise"))
        SAMPLERS[solver.__name__] = solver
        SPECS[solver.__name__] = SamplerSpec(order, evaluations, "noise" in parameters, options)
        return solver

    return register


@sampler(order=1)
def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Euler's method (Karras et al. 2206.00364, algorithm 1 without the correction):

    x' = x + (s' - s) (x - D) / s = D + s'/s (x - D)
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = _evaluate(denoise, x, s)
        x = denoised + s_next / s * (x - denoised)
        yield Step(index, s_next, x, denoised)


@sampler(order=1)
def euler_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """Euler's method to below s', then fresh noise up to s' (k-diffusion's ``sample_euler_ancestral``):

        x' = D + down/s (x - D) + up n,    up = eta s'/s sqrt(s^2 - s'^2),    down = sqrt(s'^2 - up^2)

    With eta 1 it is :func:`ddpm`, with eta 0 :func:`euler`.
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = _evaluate(denoise, x, s)
        up = min(s_next, eta * s_next / s * math.sqrt(s**2 - s_next**2))
        down = math.sqrt(s_next**2 - up**2)
        x = denoised + down / s * (x - denoised)
        if up > 0:
            x = x + up * noise(s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=1)
def ddim(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (Song et al. 2010.02502, equations 12 and 16); a is abar, e the estimate of the noise:

        x' = sqrt(a') D + sqrt(1 - a' - up^2) e + up n,    up = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

    Divided by sqrt(a') this is Euler ancestral; with eta 0, as it is mostly used, Euler.
    """
    yield from euler_ancestral(denoise, x, sigmas, noise, eta)


@sampler(order=1)
def ddpm(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, variance: Literal["small", "large"] = "small"
) -> Iterator[Step]:
    """DDPM (Ho et al. 2006.11239, algorithm 2): draws from the posterior q(x' | x, x0 = D), at last its mean.

    x' = D + (s'/s)^2 (x - D) + sqrt(variance) n
    small: variance = (s'/s)^2 (s^2 - s'^2), that of the posterior; this is Euler ancestral
    large: variance = (1 + s'^2) / (1 + s^2) (s^2 - s'^2), which is beta_t in these coordinates
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = _evaluate(denoise, x, s)
        x = denoised + (s_next / s) ** 2 * (x - denoised)
        if s_next > 0:
            share = (s_next / s) ** 2 if variance == "small" else (1 + s_next**2) / (1 + s**2)
            x = x + math.sqrt(share * (s**2 - s_next**2)) * noise(s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=2, evaluations=2)
def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Heun's method (Karras et al. 2206.00364, algorithm 1): Euler's step, redone with its mean slope.

        d = (x - D(x, s)) / s,    d' = (x_euler - D(x_euler, s')) / s',    x' = x + (s' - s) (d + d') / 2

    D is not defined at 0, so a step to 0 remains Euler's.
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = _evaluate(denoise, x, s)
        x_euler = denoised + s_next / s * (x - denoised)
        if s_next > 0:
            slope = (x - denoised) / s
            slope_next = (x_euler - _evaluate(denoise, x_euler, s_next)) / s_next
            x = x + (s_next - s) / 2 * (slope + slope_next)
        else:
            x = x_euler
        yield Step(index, s_next, x, denoised)


@sampler(order=2)
def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2211.01095, algorithm 2): D extrapolated to the middle of the step in ln s.

        h = ln s - ln s',    D* = D + h / (2 h_last) (D - D_last),    x' = D* + s'/s (x - D*)

    The first step, which has no D_last, and a step to 0, which has no middle in ln s, take D itself.
    """
    denoised_last, h_last = None, 0.0
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = _evaluate(denoise, x, s)
        extrapolated = denoised
        if s_next > 0:
            h = math.log(s / s_next)
            if denoised_last is not None:
                extrapolated = denoised + h / (2 * h_last) * (denoised - denoised_last)
            denoised_last, h_last = denoised, h
        x = extrapolated + s_next / s * (x - extrapolated)
        yield Step(index, s_next, x, denoised)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Noise in which each picture draws from a CPU generator of its own, whatever batch it is in.

    Args:
        seeds: one for each picture of the batch.
        shape: of one picture.
        device: where the noise is wanted.

    Returns:
        A function that gives unit Gaussian noise [len(seeds) *shape] fp32, anew at each call. Let its first
        call make the starting noise, so that the noise of the steps is independent of it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)

    return noise


def _evaluate(denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
    """D(x, sigma) with one noise level for the whole batch."""
    return denoise(x, x.new_full((len(x),), sigma))
