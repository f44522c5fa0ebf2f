"""Noise sources for stochastic solvers; the noise of an image does not depend on its batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ldm.diffusion.samplers.interface import Noise
from ldm.errors import missing_extra


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Return a noise source that draws each image's noise from its own CPU generator, independent of the batch.

    Args:
        seeds: one for each image of the batch.
        shape: of one image.
        device: device of the noise.

    Returns:
        A function that returns new unit Gaussian noise [len(seeds) *shape] fp32 at each call. Use its first
        call for the initial noise, so that the noise of the steps is independent of it.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def noise(sigma: float, sigma_next: float) -> torch.Tensor:
        unit = [torch.randn(*shape, generator=each, dtype=torch.float32, device="cpu") for each in generators]
        return torch.stack(unit).to(device)

    return noise


def brownian_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    sigma_min: float,
    sigma_max: float,
    device: torch.device | str = "cpu",
) -> Noise:
    """Return a noise source that takes the increments of a Brownian path over the noise levels, one path per image.

    The path depends on the seed, not on the steps: a sample of 20 steps approximates that of 50 steps, and the composition
    of an image is kept when the number of steps changes (k-diffusion's Brownian tree).

    Args:
        seeds: one for each image of the batch.
        shape: of one image.
        sigma_min, sigma_max: range of noise levels of the path; levels outside are clamped.
        device: device of the noise.

    Returns:
        A function of (sigma, sigma_next) that returns (W(sigma) - W(sigma_next)) / sqrt(sigma - sigma_next), unit
        Gaussian noise [len(seeds) *shape] fp32, always the same for the same two levels.

    Raises:
        MissingExtraError: torchsde, which computes the paths, is not installed.
    """
    try:
        from torchsde import BrownianTree
    except ImportError:
        raise missing_extra("torchsde", "a sampler that takes its noise from a Brownian path", "sde") from None

    zero = torch.zeros(*shape, dtype=torch.float32, device="cpu")
    paths = [BrownianTree(t0=sigma_min, w0=zero, t1=sigma_max, entropy=seed % 2**32) for seed in seeds]

    def noise(sigma: float, sigma_next: float) -> torch.Tensor:
        low, high = (min(max(level, sigma_min), sigma_max) for level in sorted((sigma_next, sigma)))
        increments = torch.stack([path(low, high) for path in paths])
        return (increments / math.sqrt(high - low)).to(device)

    return noise
