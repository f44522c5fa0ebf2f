"""Interface of the solvers, and the registry of all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ldm.diffusion.spacing import Grid

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Maps noisy x [b ...] and its noise levels sigma [b], above 0, to an estimate of the clean x0 [b ...]."""

Noise = Callable[[float, float], Tensor]
"""Maps (sigma, sigma_next) of a step to the unit Gaussian noise, of the shape of x, that the step adds."""


@dataclass(frozen=True)
class Step:
    """What a solver yields after each interval of the grid."""

    index: int
    """Index of the interval, from 0."""
    sigma: float
    """Noise level of ``x``, ``sigmas[index + 1]``; for an adaptive solver the largest in the batch."""
    x: Tensor
    """The sample after the step."""
    denoised: Tensor
    """Estimate D of the clean image at the start of the step."""


@dataclass(frozen=True)
class SamplerSpec:
    """Properties of a solver."""

    order: int
    """Order of convergence: halving the step size divides the error by 2^order (weak order, if it is stochastic)."""
    evaluations: int
    """Denoiser evaluations per step (the first and the last step may differ)."""
    stochastic: bool
    """If True, the solver takes ``noise``."""
    brownian: bool
    """If True, the noise should come from a Brownian path, so that grids of any length see the same path."""
    adaptive: bool
    """If True, only the ends of the grid are used; the solver chooses its own steps."""
    options: tuple[str, ...]
    """Names of further parameters; keys of ``OPTIONS``."""
    grid: Grid
    """Interpretation of the spacings ``leading`` and ``linspace`` by its family of solvers."""

    @property
    def noise(self) -> str:
        """Kind of noise that it takes: none, white or brownian."""
        return "none" if not self.stochastic else "brownian" if self.brownian else "white"


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {}
"""Solvers by name. Each takes ``denoise``, an initial ``x`` [b ...] of noise level ``sigmas[0]``, decreasing
``sigmas`` [n + 1] of which only the last may be 0, ``noise`` if it is stochastic, and its options."""

SPECS: dict[str, SamplerSpec] = {}
"""Properties of the solvers, by the same names."""

OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "eta": (lambda value: isinstance(value, int | float) and 0 <= value <= 1, "from 0 to 1"),
    "order": (lambda value: isinstance(value, int) and value >= 1, "a whole number, 1 or more"),
    "variance": (lambda value: value in ("small", "large"), "small or large"),
    "rtol": (lambda value: isinstance(value, int | float) and value > 0, "above 0"),
    "atol": (lambda value: isinstance(value, int | float) and value > 0, "above 0"),
    "h_init": (lambda value: isinstance(value, int | float) and value > 0, "above 0"),
}
"""Options of the samplers: a check of the value, and the accepted range in words."""

Solver = TypeVar("Solver", bound=Callable[..., Iterator[Step]])


def sampler(
    order: int, evaluations: int = 1, brownian: bool = False, adaptive: bool = False, grid: Grid = "fractional"
) -> Callable[[Solver], Solver]:
    """Register a solver in ``SAMPLERS`` and ``SPECS``; its options and whether it is stochastic follow from its signature."""

    def register(solver: Solver) -> Solver:
        parameters = list(inspect.signature(solver).parameters)
        options = tuple(name for name in parameters if name not in ("denoise", "x", "sigmas", "noise"))
        assert OPTIONS.keys() >= set(options), f"OPTIONS lacks an option of {solver.__name__}"
        SAMPLERS[solver.__name__] = solver
        stochastic = "noise" in parameters
        SPECS[solver.__name__] = SamplerSpec(order, evaluations, stochastic, brownian, adaptive, options, grid)
        return solver

    return register


PURE_NOISE = 1000.0
"""Noise levels above it count as pure noise; schedules with a finite terminal SNR stay below (SD: 14.6, SVD: 700)."""

MAX_SIGMA_RATIO = 50.0
"""Largest ratio of two noise levels for which a step from pure noise uses the slope at the lower level."""


def step_too_large(s: float, s_next: float) -> bool:
    """Return True if a step from s to s' must be an Euler step, because the slope at s' is of no use.

    A higher-order correction multiplies changes of D by s/s'. That diverges at s' = 0, and is too large for the first step
    from pure noise (zero terminal SNR, flow), where s is nearly unbounded while D hardly depends on it.
    """
    return s_next == 0 or s > max(MAX_SIGMA_RATIO * s_next, PURE_NOISE)


def evaluate(denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
    """Evaluate D(x, sigma) at one noise level for the whole batch."""
    return denoise(x, x.new_full((len(x),), sigma))


def euler_step(x: Tensor, denoised: Tensor, s: float, s_next: float) -> Tensor:
    """Take the Euler step from noise level s to s', exact for constant D: D + s'/s (x - D)."""
    return denoised + s_next / s * (x - denoised)
