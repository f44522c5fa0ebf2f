"""Multistep solvers: one evaluation per step, combined with those of previous steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, reduce
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.samplers.interface import Denoiser, Noise, Step, euler_step, evaluate, sampler, step_too_large

FEW_STEPS = 15
"""Number of steps below which the last steps of deis are of lower order, because they would overshoot."""


@sampler(order=2, grid="rounded")
def plms(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2202.09778, equations 9 and 12), Stable Diffusion's first default:

        x' = x + (s' - s) e*,    e* = (55 e - 59 e_1 + 37 e_2 - 9 e_3) / 24,    e = (x - D) / s

    e is the estimated noise. The first steps use formulas of lower order, the very first Heun's method with two
    evaluations. The weights are those of equal steps in t, so it works best on grids that are even in t.
    """
    noises: deque[Tensor] = deque(maxlen=4)
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        noises.appendleft((x - denoised) / s)
        if index == 0 and not step_too_large(s, s_next):
            x_euler = euler_step(x, denoised, s, s_next)
            slope = (noises[0] + (x_euler - evaluate(denoise, x_euler, s_next)) / s_next) / 2
        else:
            slope = _weighted(ADAMS_BASHFORTH[len(noises)], noises)
        x = x + (s_next - s) * slope
        yield Step(index, s_next, x, denoised)


ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the slopes for equal steps, the newest first."""


@sampler(order=2)
def lms(denoise: Denoiser, x: Tensor, sigmas: Tensor, order: int = 4) -> Iterator[Step]:
    """Linear multistep (k-diffusion's ``sample_lms``): Adams-Bashforth for steps of any length.

    x' = x + integral over s..s' of P ds,    P the polynomial in s through the newest ``order`` slopes (x - D) / s
    """
    slopes: deque[Tensor] = deque(maxlen=order)
    levels: deque[float] = deque(maxlen=order)
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        slopes.appendleft((x - denoised) / s)
        levels.appendleft(s)
        x = x + _weighted(_lagrange_integrals(levels, s, s_next), slopes)
        yield Step(index, s_next, x, denoised)


@sampler(order=2, grid="inner")
def deis(denoise: Denoiser, x: Tensor, sigmas: Tensor, order: int = 2) -> Iterator[Step]:
    """DEIS, the log-rho Adams-Bashforth variant (Zhang & Chen 2204.13902, section 4 and appendix H.2):

    x' = x + integral over s..s' of P ds,    P the polynomial in ln s through the newest ``order`` slopes (x - D) / s

    A step to 0, where ln s diverges, is an Euler step; with few steps so is the last one.
    """
    slopes: deque[Tensor] = deque(maxlen=order)
    levels: deque[float] = deque(maxlen=order)
    steps = len(sigmas) - 1
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        slopes.appendleft((x - denoised) / s)
        levels.appendleft(math.log(s))
        usable = len(slopes) if steps >= FEW_STEPS else min(len(slopes), steps - index)
        if s_next == 0 or usable == 1:
            x = euler_step(x, denoised, s, s_next)
        else:
            nodes = list(levels)[:usable]
            x = x + _weighted(_lagrange_integrals(nodes, nodes[0], math.log(s_next), math.exp), list(slopes)[:usable])
        yield Step(index, s_next, x, denoised)


@sampler(order=2, grid="inner")
def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2211.01095, algorithm 2): D extrapolated to the middle of the step in ln s.

        h = ln s - ln s',    D* = D + h / (2 h_last) (D - D_last),    x' = D* + s'/s (x - D*)

    The first step, which has no D_last, and a step to 0, which has no midpoint in ln s, use D itself.
    """
    denoised_last, h_last = None, 0.0
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        extrapolated = denoised
        if s_next > 0:
            h = math.log(s / s_next)
            if denoised_last is not None:
                extrapolated = denoised + h / (2 * h_last) * (denoised - denoised_last)
            denoised_last, h_last = denoised, h
        x = euler_step(x, extrapolated, s, s_next)
        yield Step(index, s_next, x, denoised)


@sampler(order=2, brownian=True, grid="inner")
def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2211.01095, section 5 and appendix B; k-diffusion's midpoint form):

        x' = D* + q (x - D*) + s' sqrt(1 - exp(-2 eta h)) n,    q = exp(-(1 + eta) h),    D* as in dpmpp_2m

    Equals :func:`dpmpp_2m` for eta = 0.
    """
    denoised_last, h_last = None, 0.0
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        if s_next == 0:
            x = denoised
        else:
            h = math.log(s / s_next)
            extrapolated = denoised
            if denoised_last is not None:
                extrapolated = denoised + h / (2 * h_last) * (denoised - denoised_last)
            x = _sde_step(x, extrapolated, s_next, h, eta, noise(s, s_next) if eta else None)
            denoised_last, h_last = denoised, h
        yield Step(index, s_next, x, denoised)


@sampler(order=2, brownian=True)
def dpmpp_3m_sde(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """SDE-DPM-Solver++(3M), k-diffusion's extension of 2M by D's second difference (after Lu et al. 2211.01095):

        x' = D + q (x - D) + phi_2 D' - phi_3 D'' + s' sqrt(1 - exp(-2 eta h)) n,    q = exp(-k),  k = (1 + eta) h
        phi_2 = (q - 1) / k + 1,    phi_3 = phi_2 / k - 1/2

    D' and D'' are the divided differences of D in ln s, times h and h^2; the step is exact for D quadratic in ln s.
    """
    past: deque[tuple[float, Tensor]] = deque(maxlen=3)  # (h from the step before, D), the newest first
    h_last = 0.0
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        past.appendleft((h_last, denoised))
        if s_next == 0:
            x = denoised
        else:
            h = math.log(s / s_next)
            k = (1 + eta) * h
            phi_2 = math.expm1(-k) / k + 1
            x = _sde_step(x, denoised, s_next, h, eta, noise(s, s_next) if eta else None)
            if len(past) > 1:
                r = past[0][0] / h
                first = (denoised - past[1][1]) / r
                if len(past) == 3:
                    r_before = past[1][0] / h
                    second = (first - (past[1][1] - past[2][1]) / r_before) / (r + r_before)
                    first = first + r * second
                    x = x - (phi_2 / k - 0.5) * second
                x = x + phi_2 * first
            h_last = h
        yield Step(index, s_next, x, denoised)


@sampler(order=2, grid="inner")
def unipc(denoise: Denoiser, x: Tensor, sigmas: Tensor, order: int = 2) -> Iterator[Step]:
    """UniPC, the B_2 variant for data prediction (Zhao et al. 2302.04867, algorithms 1 and 2).

    Each step predicts x' from the newest ``order`` estimates D, as in dpmpp_2m; D(x', s'), which the next step evaluates
    in any case, then corrects x' before that step. The first and last steps are of lower order.
    """
    past: deque[tuple[float, Tensor]] = deque(maxlen=order)  # (s, D), the newest first
    start, used = x, 0  # start of the last step, and the number of estimates that it used
    steps = len(sigmas) - 1
    for index, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = evaluate(denoise, x, s)
        if index > 0:
            x = _unified_step(start, s, list(past)[:used], (s, denoised))
        past.appendleft((s, denoised))
        used = min(len(past), steps - index)
        start = x
        x = _unified_step(x, s_next, list(past)[:used])
        yield Step(index, s_next, x, denoised)


def _unified_step(
    x: Tensor, s_next: float, past: Sequence[tuple[float, Tensor]], ahead: tuple[float, Tensor] | None = None
) -> Tensor:
    """Take a step of UniP-p, or of UniC-p if ``ahead`` gives D at the end of the step (Zhao et al. 2302.04867, section 3).

        x' = D + s'/s (x - D) + (1 - s'/s) sum_k rho_k (D_k - D) / r_k,    r_k = ln(s/s_k) / h,    h = ln(s/s')

    The rho_k make the step exact for polynomials in ln s up to their number: sum_k rho_k r_k^(i-1) = b_i with
    b_i = i! phi_(i+1)(-h) / (1 - s'/s), up to sign. A single one is 1/2.
    """
    (s, denoised), others = past[0], [*past[1:], *([ahead] if ahead else [])]
    result = euler_step(x, denoised, s, s_next)
    if not others:
        return result
    h, share = math.log(s / s_next), 1 - s_next / s
    r = [math.log(s / level) / h for level, _ in others]
    rho = [0.5]
    if len(others) > 1:
        b, phi = [], -share / -h - 1
        for i in range(1, len(others) + 1):
            b.append(phi * math.factorial(i) / -share)
            phi = phi / -h - 1 / math.factorial(i + 1)
        powers = torch.tensor(
            [[ratio**i for ratio in r] for i in range(len(others))], dtype=torch.float64, device="cpu"
        )
        rho = torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64, device="cpu")).tolist()
    differences = [other - denoised for _, other in others]
    return result + share * _weighted([weight / ratio for weight, ratio in zip(rho, r, strict=True)], differences)


def _sde_step(x: Tensor, denoised: Tensor, s_next: float, h: float, eta: float, noise: Tensor | None) -> Tensor:
    """Solve the SDE of that eta exactly for constant D: x decays faster than for the ODE, and noise is added."""
    x = denoised + math.exp(-(1 + eta) * h) * (x - denoised)
    return x if noise is None else x + s_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise


def _weighted(weights: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    """sum_k w_k t_k"""
    return reduce(torch.add, (weight * tensor for weight, tensor in zip(weights, tensors, strict=True)))


def _lagrange_integrals(
    nodes: Iterable[float],
    start: float,
    end: float,
    density: Callable[[float], float] = lambda u: 1.0,
) -> list[float]:
    """Integrate density(u) L(u) over start..end for each node, where L is its Lagrange polynomial (1 there, 0 at the others)."""
    nodes, half, middle = list(nodes), (end - start) / 2, (end + start) / 2
    integrals = []
    for node in nodes:
        total = 0.0
        for place, weight in _gauss_legendre(16):
            u = middle + half * place
            basis = math.prod((u - other) / (node - other) for other in nodes if other != node)
            total += half * weight * density(u) * basis
        integrals.append(total)
    return integrals


@cache
def _gauss_legendre(n: int) -> list[tuple[float, float]]:
    """Return nodes and weights of Gauss-Legendre quadrature on [-1, 1], exact up to degree 2n - 1 (Golub & Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64, device="cpu")
    beside = k / (4 * k**2 - 1).sqrt()
    places, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return list(zip(places.tolist(), (2 * vectors[0] ** 2).tolist(), strict=True))
