"""Samplers: solvers that turn noise into an image with a denoiser, along a decreasing grid of noise levels.

A denoiser returns D(x, s), the expected clean image given x = x0 + s n, which determines the score. A sample follows

    dx/ds = (x - D(x, s)) / s                     (Karras et al. 2206.00364, equations 1 and 3)

from large s down to 0, or a stochastic process with the same marginals. Each solver is a generator that keeps
its state in locals and yields a :class:`Step` for each interval of the grid; the caller owns the loop:

    for step in euler(denoise, x, sigmas):
        x = step.x

Where D is constant, the equation is solved exactly by x' = D + s'/s (x - D), a straight line towards D:
:func:`~ldm.diffusion.samplers.interface.euler_step`. Most solvers are this step, with a better estimate in
place of D or with noise added after it. In papers that write x_t = alpha x0 + sigma n, x_t is alpha times the x used here and
sigma / alpha is s; in these coordinates alpha is 1, and the half-log-SNR lambda is -ln s.
"""

from __future__ import annotations

from ldm.diffusion.samplers.adaptive import dpm_adaptive
from ldm.diffusion.samplers.interface import OPTIONS, SAMPLERS, SPECS, Denoiser, Noise, SamplerSpec, Step
from ldm.diffusion.samplers.multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms, plms, unipc
from ldm.diffusion.samplers.noise import brownian_noise, seeded_noise
from ldm.diffusion.samplers.single_step import (
    ddim,
    ddpm,
    dpm2,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
)

__all__ = [
    "OPTIONS",
    "SAMPLERS",
    "SPECS",
    "Denoiser",
    "Noise",
    "SamplerSpec",
    "Step",
    "brownian_noise",
    "ddim",
    "ddpm",
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpm_adaptive",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "lcm",
    "lms",
    "plms",
    "seeded_noise",
    "unipc",
]
