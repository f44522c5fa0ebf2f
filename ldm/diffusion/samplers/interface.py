"""What a solver takes and gives, and the table of all solvers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ldm.diffusion.spacing import Grid

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
    """The noise level that x has now, ``sigmas[index + 1]``; of an adaptive solver the greatest in the batch."""
    x: Tensor
    """The sample after the step."""
    denoised: Tensor
    """D at the start of the step: the image as seen from there."""


@dataclass(frozen=True)
class SamplerSpec:
    """What there is to know of a solver without running it."""

    order: int
    """Order of convergence: halving the steps' length divides the error by 2^order (in law, if it is stochastic)."""
    evaluations: int
    """Calls of the denoiser in a step (the first and the last may differ)."""
    stochastic: bool
    """Whether it takes ``noise``."""
    brownian: bool
    """Whether that noise should be a Brownian path's, so that grids of all lengths see the same."""
    adaptive: bool
    """Whether it takes only the ends of the grid and chooses its steps by itself."""
    options: tuple[str, ...]
    """Names of its further parameters, of ``OPTIONS``."""
    grid: Grid
    """How its family reads the spacings leading and linspace."""

    @property
    def noise(self) -> str:
        """What noise it takes: none, white or brownian."""
        return "none" if not self.stochastic else "brownian" if self.brownian else "white"


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {}
"""Solvers by name. Each takes ``denoise``, a starting ``x`` [b ...] of noise level ``sigmas[0]``, falling
``sigmas`` [n + 1] of which only the last may be 0, ``noise`` if it is stochastic, and its options."""

SPECS: dict[str, SamplerSpec] = {}
"""The same names to their :class:`SamplerSpec`."""

OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "eta": (lambda value: isinstance(value, int | float) and 0 <= value <= 1, "from 0 to 1"),
    "order": (lambda value: isinstance(value, int) and value >= 1, "a whole number, 1 or more"),
    "variance": (lambda value: value in ("small", "large"), "small or large"),
    "rtol": (lambda value: isinstance(value, int | float) and value > 0, "above 0"),
    "atol": (lambda value: isinstance(value, int | float) and value > 0, "above 0"),
    "h_init": (lambda value: isinstance(value, int | float) and value > 0, "above 0"),
}
"""What the options of samplers must be."""

Solver = TypeVar("Solver", bound=Callable[..., Iterator[Step]])


def sampler(
    order: int, evaluations: int = 1, brownian: bool = False, adaptive: bool = False, grid: Grid = "fractional"
) -> Callable[[Solver], Solver]:
    """Enter a solver in ``SAMPLERS`` and ``SPECS``; what else there is to know is read from its signature."""

    def register(solver: Solver) -> Solver:
        parameters = list(inspect.signature(solver).parameters)
        options = tuple(name for name in parameters if name not in ("denoise", "x", "sigmas", "noise"))
        assert OPTIONS.keys() >= set(options), f"say in OPTIONS what those of {solver.__name__} must be"
        SAMPLERS[solver.__name__] = solver
        stochastic = "noise" in parameters
        SPECS[solver.__name__] = SamplerSpec(order, evaluations, stochastic, brownian, adaptive, options, grid)
        return solver

    return register


PURE_NOISE = 1000.0
"""Levels beyond it are pure noise: none of a schedule with a finite terminal SNR comes near (14.6 of SD, 700 of SVD)."""

MAX_SIGMA_RATIO = 50.0
"""Beyond this ratio of two levels, a slope found at the lower one is not to be followed down from pure noise."""


def step_too_large(s: float, s_next: float) -> bool:
    """Whether a slope at s' says nothing of the way from s, so that a step has to remain Euler's.

    Of a change in D it makes a change s/s' times as great in x'. It is so at s' = 0, and in the first step from pure
    noise (zero terminal SNR, flow), where s has no bound and D hardly depends on it.
    """
    return s_next == 0 or s > max(MAX_SIGMA_RATIO * s_next, PURE_NOISE)


def evaluate(denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
    """D(x, sigma) with one noise level for the whole batch."""
    return denoise(x, x.new_full((len(x),), sigma))


def euler_step(x: Tensor, denoised: Tensor, s: float, s_next: float) -> Tensor:
    """From noise level s to s' while D stays as it is: D + s'/s (x - D)."""
    return denoised + s_next / s * (x - denoised)
