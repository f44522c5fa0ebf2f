"""Stochastic solvers on data whose law and exact denoiser are known: a mixture of three Gaussians in the plane."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.diffusion import SPECS
from ldm.diffusion.schedule import karras_levels
from tests.diffusion.test_samplers import run

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.3, -1.2]])
STD = 0.4
SIGMA_MAX, SIGMA_MIN = 10.0, 0.1
POINTS = 200_000
COUNTS = (8, 16, 32)


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean: each centre's own, by the probability that x comes from it."""
    variance = sigma[:, None, None] ** 2 + STD**2
    offsets = x[:, None] - CENTRES
    share = (WEIGHTS.log() - offsets.square().sum(-1) / (2 * variance[..., 0])).softmax(1)
    return (share[..., None] * (CENTRES + STD**2 / variance * offsets)).sum(1)


def moments() -> Tensor:
    """Mean and covariance of the mixture with noise of SIGMA_MIN on it."""
    mean = WEIGHTS @ CENTRES
    offsets = CENTRES - mean
    covariance = (WEIGHTS[:, None] * offsets).T @ offsets + (STD**2 + SIGMA_MIN**2) * torch.eye(2)
    return torch.cat([mean, covariance.flatten()])


def error(x: Tensor) -> tuple[float, float]:
    """Of the moments of a sample: the greatest in standard errors' unit, and that unit."""
    centred = x - x.mean(0)
    products = (centred[:, :, None] * centred[:, None, :]).flatten(1)
    found = torch.cat([x.mean(0), products.mean(0)])
    unit = torch.cat([x.std(0), products.std(0)]).max() / math.sqrt(len(x))
    return (found - moments()).abs().max().item(), unit.item()


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.stochastic and name != "lcm"])
def test_mean_and_covariance_of_a_mixture_converge_with_the_order_of_the_solver(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(WEIGHTS, POINTS, replacement=True, generator=generator)
    noise = torch.randn(POINTS, 2, generator=generator)
    start = CENTRES[which] + math.sqrt(STD**2 + SIGMA_MAX**2) * noise
    errors, units = [], []
    for n in COUNTS:
        grid = karras_levels(SIGMA_MAX, SIGMA_MIN, 7.0, n + 1).float()
        options = {"eta": 1.0} if name == "ddim" else {}
        found, unit = error(run(name, denoise, start, grid, seed=n, **options)[-1].x)
        errors.append(found)
        units.append(unit)
    for coarse, fine, unit in zip(errors[:-1], errors[1:], units[1:], strict=True):
        assert fine < coarse / 2 ** (SPECS[name].order - 0.5) + 4 * unit, f"errors {errors}, standard errors {units}"
