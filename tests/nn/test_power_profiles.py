from __future__ import annotations

import math

import pytest
import torch

from ldm.nn.power_profiles import Profile, coefficients, decay, distance, exponent, inner_product


def values(profile: Profile, n: int = 200_000, until: int = 1000) -> torch.Tensor:
    """p(tau) on a grid of [0, until]."""
    tau = (torch.arange(n, dtype=torch.float64) + 0.5) * until / n
    g = exponent(profile.length)
    return torch.where(tau <= profile.step, (g + 1) / profile.step * (tau / profile.step) ** g, 0.0)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_length_is_the_standard_deviation_of_the_profile(length: float) -> None:
    p = values(Profile(1000, length)) / 200_000 * 1000
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    mean = (p * tau).sum()
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert math.sqrt((p * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-5)


def test_the_exponents_are_those_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


def test_the_decays_give_the_profile() -> None:
    """The share of step k in the average after step n, prod (decays) (1 - decay), is the integral of p over the step."""
    length, n = 0.1, 50
    decays = [decay(length, step) for step in range(1, n + 1)]
    shares = [(1 - decays[k]) * math.prod(decays[k + 1 :]) for k in range(n)]
    g = exponent(length)
    assert shares == pytest.approx([((k + 1) / n) ** (g + 1) - (k / n) ** (g + 1) for k in range(n)], abs=1e-12)


@pytest.mark.parametrize("pair", [((1000, 0.05), (1000, 0.1)), ((700, 0.2), (1000, 0.1)), ((1000, 0.2), (300, 0.07))])
def test_the_inner_product_is_the_integral(pair: tuple[tuple[int, float], tuple[int, float]]) -> None:
    a, b = (Profile(*each) for each in pair)
    assert inner_product(a, b) == pytest.approx(float((values(a) * values(b)).sum() * 1000 / 200_000), rel=1e-4)


def test_the_coefficients_of_a_stored_profile_are_that_profile() -> None:
    stored = [Profile(step, length) for step in (250, 500, 750, 1000) for length in (0.05, 0.1)]
    assert coefficients(stored, stored[5]) == pytest.approx([0, 0, 0, 0, 0, 1, 0, 0], abs=1e-8)


@pytest.mark.parametrize(("count", "error"), [(64, 1e-3), (10, 0.025)])
@pytest.mark.parametrize("length", [0.06, 0.08, 0.12, 0.15])
def test_reconstructed_profiles_are_as_exact_as_documented(count: int, error: float, length: float) -> None:
    """From averages of lengths 0.05 and 0.1; the relative distance in the mean square, of docs/stages.md."""
    stored = [Profile(1000 * (i + 1), each) for i in range(count) for each in (0.05, 0.1)]
    target = Profile(1000 * count, length)
    factors = coefficients(stored, target)
    found = sum(
        float(factor) * values(each, 10_000, 1000 * count) for factor, each in zip(factors, stored, strict=True)
    )
    wanted = values(target, 10_000, 1000 * count)
    assert (found - wanted).norm() < error * wanted.norm()
    assert distance(stored, factors, target) == pytest.approx(float((found - wanted).norm() / wanted.norm()), abs=1e-4)


@pytest.mark.parametrize("length", [0.01, 0.07, 0.15, 0.25])
def test_weights_that_never_changed_stay_what_they_are(length: float) -> None:
    """Also with few snapshots, and with lengths outside of those stored, whose profiles are met badly."""
    stored = [Profile(step, each) for step in (1000, 2000, 2800) for each in (0.05, 0.1)]
    factors = coefficients(stored, Profile(2800, length))
    assert factors.sum() == pytest.approx(1)
    assert (distance(stored, factors, Profile(2800, length)) < 0.05) == (length == 0.07)
