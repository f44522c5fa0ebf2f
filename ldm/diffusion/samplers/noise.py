"""The noise that stochastic solvers add: each image's own, whatever batch it is in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ldm.diffusion.samplers.interface import Noise
from ldm.errors import missing_extra


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Noise in which each image draws from a CPU generator of its own, whatever batch it is in.

    Args:
        seeds: one for each image of the batch.
        shape: of one image.
        device: where the noise is wanted.

    Returns:
        A function that gives unit Gaussian noise [len(seeds) *shape] fp32, anew at each call. Let its first
        call make the starting noise, so that the noise of the steps is independent of it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(sigma: float, sigma_next: float) -> torch.Tensor:
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)

    return noise


def brownian_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    sigma_min: float,
    sigma_max: float,
    device: torch.device | str = "cpu",
) -> Noise:
    """Noise that is read off a Brownian path over the noise levels, one path an image.

    The path is fixed by the seed, not by the steps: a sample in 20 steps is then a coarser version of that in 50,
    and an image keeps its composition when their number changes (k-diffusion's Brownian tree).

    Args:
        seeds: one for each image of the batch.
        shape: of one image.
        sigma_min, sigma_max: the levels between which it is defined; others are moved to the nearer end.
        device: where the noise is wanted.

    Returns:
        A function of (sigma, sigma_next) that gives (W(sigma) - W(sigma_next)) / sqrt(sigma - sigma_next), unit
        Gaussian noise [len(seeds) *shape] fp32, the same each time it is asked for the same two levels.

    Raises:
        MissingExtraError: torchsde, which makes the paths, is not installed.
    """
    try:
        from torchsde import BrownianTree
    except ImportError:
        raise missing_extra("torchsde", "a sampler that takes its noise from a Brownian path", "sde") from None

    paths = [BrownianTree(t0=sigma_min, w0=torch.zeros(*shape), t1=sigma_max, entropy=seed % 2**32) for seed in seeds]

    def noise(sigma: float, sigma_next: float) -> torch.Tensor:
        low, high = (min(max(level, sigma_min), sigma_max) for level in sorted((sigma_next, sigma)))
        increments = torch.stack([path(low, high) for path in paths])
        return (increments / math.sqrt(high - low)).to(device)

    return noise
