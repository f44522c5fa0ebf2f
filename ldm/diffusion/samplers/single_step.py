"""Single-step solvers: each step uses evaluations of its own interval only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ldm.diffusion.samplers.interface import Denoiser, Noise, Step, euler_step, evaluate, sampler, step_too_large


@sampler(order=1)
def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Euler's method (Karras et al. 2206.00364, algorithm 1 without the correction):

    x' = x + (s' - s) (x - D) / s = D + s'/s (x - D)
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        x = euler_step(x, denoised, s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=1)
def euler_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """Euler's method to a level below s', then noise that raises it to s' (k-diffusion's ``sample_euler_ancestral``):

        x' = D + down/s (x - D) + up n,    up = eta s'/s sqrt(s^2 - s'^2),    down = sqrt(s'^2 - up^2)

    Equals :func:`ddpm` for eta = 1 and :func:`euler` for eta = 0.
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        down, up = down_and_up(s, s_next, eta)
        x = euler_step(x, denoised, s, down)
        if up > 0:
            x = x + up * noise(s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=1, grid="rounded")
def ddim(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (Song et al. 2010.02502, equations 12 and 16); a is abar, e the estimated noise:

        x' = sqrt(a') D + sqrt(1 - a' - up^2) e + up n,    up = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

    Divided by sqrt(a') this is Euler ancestral, and Euler's method for eta = 0, the usual choice.
    """
    yield from euler_ancestral(denoise, x, sigmas, noise, eta)


@sampler(order=1, grid="rounded")
def ddpm(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, variance: Literal["small", "large"] = "small"
) -> Iterator[Step]:
    """DDPM (Ho et al. 2006.11239, algorithm 2): samples the posterior q(x' | x, x0 = D), in the last step its mean.

    x' = D + (s'/s)^2 (x - D) + sqrt(variance) n
    small: variance = (s'/s)^2 (s^2 - s'^2), that of the posterior; equals Euler ancestral
    large: variance = (1 + s'^2) / (1 + s^2) (s^2 - s'^2), which is beta_t in these coordinates
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        x = denoised + (s_next / s) ** 2 * (x - denoised)
        if s_next > 0:
            share = (s_next / s) ** 2 if variance == "small" else (1 + s_next**2) / (1 + s**2)
            x = x + math.sqrt(share * (s**2 - s_next**2)) * noise(s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=2, evaluations=2)
def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Heun's method (Karras et al. 2206.00364, algorithm 1): an Euler step corrected with the mean of both slopes.

        d = (x - D(x, s)) / s,    d' = (x_euler - D(x_euler, s')) / s',    x' = x + (s' - s) (d + d') / 2

    Steps to 0, where D is not defined, and from pure noise are Euler steps.
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        x_euler = euler_step(x, denoised, s, s_next)
        if not step_too_large(s, s_next):
            slope = (x - denoised) / s
            slope_next = (x_euler - evaluate(denoise, x_euler, s_next)) / s_next
            x = x + (s_next - s) / 2 * (slope + slope_next)
        else:
            x = x_euler
        yield Step(index, s_next, x, denoised)


@sampler(order=2, evaluations=2)
def dpm2(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver-2 as k-diffusion has it (Karras et al. 2206.00364, algorithm 2; Lu et al. 2206.00927):

        m = sqrt(s s'),    d = (x_m - D(x_m, m)) / m  with Euler's x_m,    x' = x + (s' - s) d

    Uses the slope at the midpoint of the step in ln s. Steps to 0, which have no such midpoint, are Euler steps.
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        x = _by_middle_slope(denoise, x, denoised, s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=2, evaluations=2)
def dpm2_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """:func:`dpm2` to a level below s', then noise that raises it to s', as in :func:`euler_ancestral` (k-diffusion)."""
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        down, up = down_and_up(s, s_next, eta)
        x = _by_middle_slope(denoise, x, denoised, s, down)
        if up > 0:
            x = x + up * noise(s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=2, evaluations=2)
def dpmpp_2s_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2211.01095, algorithm 1 with r = 1/2) to a level below s', then noise up to s':

    m = sqrt(s down),    x_m = D + m/s (x - D),    x' = D_m + down/s (x - D_m) + up n,    D_m = D(x_m, m)
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        down, up = down_and_up(s, s_next, eta)
        better = denoised
        if down > 0:
            middle = math.sqrt(s * down)
            better = evaluate(denoise, euler_step(x, denoised, s, middle), middle)
        x = euler_step(x, better, s, down)
        if up > 0:
            x = x + up * noise(s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=2, evaluations=2, brownian=True)
def dpmpp_sde(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """DPM-Solver++ for the SDE, single step (Lu et al. 2211.01095, section 5; k-diffusion's form with r = 1/2):

        m = sqrt(s s'),    x_m = D + down_m/s (x - D) + up_m n_m,    x' = D_m + down/s (x - D_m) + up n

    An ancestral step to the midpoint gives D_m there; the full step is then taken with D_m.
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        better = denoised
        if s_next > 0:
            middle = math.sqrt(s * s_next)
            down, up = down_and_up(s, middle, eta)
            x_middle = euler_step(x, denoised, s, down)
            if up > 0:
                x_middle = x_middle + up * noise(s, middle)
            better = evaluate(denoise, x_middle, middle)
        down, up = down_and_up(s, s_next, eta)
        x = euler_step(x, better, s, down)
        if up > 0:
            x = x + up * noise(s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=1, grid="rounded")
def lcm(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling (Luo et al. 2310.04378, algorithm 3): x' = D + s' n

    For consistency-distilled networks, whose D is a sample rather than a mean; with other networks few steps give blurred images.
    """
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        x = denoised if s_next == 0 else denoised + s_next * noise(s, s_next)
        yield Step(index, s_next, x, denoised)


def down_and_up(s: float, s_next: float, eta: float) -> tuple[float, float]:
    """Return the level to which an ancestral step goes down, and the deviation of the noise that it adds: down^2 + up^2 = s'^2.

    up = eta s'/s sqrt(s^2 - s'^2), at most s'; for eta = 1 the standard deviation of the posterior q(x' | x, x0).
    """
    up = min(s_next, eta * s_next / s * math.sqrt(s**2 - s_next**2))
    return math.sqrt(s_next**2 - up**2), up


def _by_middle_slope(denoise: Denoiser, x: Tensor, denoised: Tensor, s: float, s_next: float) -> Tensor:
    """Take a step with the slope at the midpoint in ln s; see :func:`dpm2`."""
    middle = math.sqrt(s * s_next)
    if step_too_large(s, middle):
        return euler_step(x, denoised, s, s_next)
    x_middle = euler_step(x, denoised, s, middle)
    return x + (s_next - s) / middle * (x_middle - evaluate(denoise, x_middle, middle))
