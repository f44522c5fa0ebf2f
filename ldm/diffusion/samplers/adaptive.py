"""Adaptive solver: chooses its step sizes by an estimate of the local error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.samplers.interface import Denoiser, Step, sampler
from ldm.errors import SamplingError

SAFETY = 0.81
"""A step is accepted if the proposed next step is at least this fraction of it."""

MAX_STEPS = 1000
"""Number of attempted steps after which sampling fails."""


@dataclass
class _Integral:
    """Step size of each image, [b 1 ...], with the integral controller of k-diffusion that adapts it."""

    h: Tensor
    order: int

    def propose(self, error: Tensor) -> Tensor:
        """Return which steps are accepted, [b 1 ...] of bool, and adapt the step sizes."""
        factor = 1 + torch.atan((error + 1e-8) ** (-1 / self.order) - 1)
        self.h = self.h * factor
        return factor >= SAFETY


@sampler(order=3, evaluations=3, adaptive=True)
def dpm_adaptive(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
) -> Iterator[Step]:
    """DPM-Solver-12 and -23 with adaptive steps (Lu et al. 2206.00927, algorithms 4 and 5, appendix C).

    A step of order 2 and one of order 3 share their evaluations; their difference, relative to ``atol`` and ``rtol`` times
    the value, decides whether the step is accepted and how large the next one is. Each image has its own step sizes, so
    that it does not depend on its batch. Only the ends of ``sigmas`` are used; a 0 at the end adds one step.

    Args:
        rtol, atol: relative and absolute tolerance of a step; smaller is slower and more accurate.
        h_init: size of the first step in ln s.

    Raises:
        SamplingError: the end is not reached after ``MAX_STEPS`` steps, as with tolerances below the precision of fp32.
    """
    levels = [level for level in sigmas.tolist() if level > 0]
    end = -math.log(levels[-1])
    column = (-1, *[1] * (x.ndim - 1))
    t = x.new_full((len(x),), -math.log(levels[0])).reshape(column)  # -ln s
    control = _Integral(torch.full_like(t, h_init), order=3)
    before, index = x, 0
    denoised = x

    def noise_in(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and the estimated noise (x - D) / s at s = exp(-t)."""
        s = (-t).exp()
        denoised = denoise(x, s.flatten())
        return denoised, (x - denoised) / s

    while index < MAX_STEPS and bool((t < end - 1e-5).any()):
        h = torch.minimum(control.h, end - t).clamp(min=0)
        to = t + h
        denoised, e = noise_in(x, t)
        third, two_thirds = t + h / 3, t + 2 * h / 3
        _, e_third = noise_in(x - (-third).exp() * (h / 3).expm1() * e, third)
        low = x - (-to).exp() * h.expm1() * (e + 1.5 * (e_third - e))
        bend = 2 * ((2 * h / 3).expm1() / (2 * h / 3).clamp(min=1e-8) - 1)
        x_two = x - (-two_thirds).exp() * ((2 * h / 3).expm1() * e + bend * (e_third - e))
        _, e_two = noise_in(x_two, two_thirds)
        bend = 1.5 * (h.expm1() / h.clamp(min=1e-8) - 1)
        high = x - (-to).exp() * (h.expm1() * e + bend * (e_two - e))

        tolerance = (rtol * torch.maximum(low.abs(), before.abs())).clamp(min=atol)
        error = ((low - high) / tolerance).square().flatten(1).mean(1).sqrt().reshape(column)
        active = t < end - 1e-5
        accepted = control.propose(error) & active
        before, x, t = torch.where(accepted, low, before), torch.where(accepted, high, x), torch.where(accepted, to, t)
        yield Step(index, float((-t).exp().max()), x, denoised)
        index += 1
    if bool((t < end - 1e-5).any()):
        raise SamplingError(
            f"dpm_adaptive has not reached the last noise level after {MAX_STEPS} steps; increase rtol, atol or h_init."
        )
    if sigmas[-1] == 0:
        x, _ = noise_in(x, t)
        yield Step(index, 0.0, x, x)
