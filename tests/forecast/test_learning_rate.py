from __future__ import annotations

import math

import numpy as np
import pytest

from ldm.forecast.learning_rate import RangeTest, range_test


@pytest.mark.parametrize("curvature", [0.5, 40.0, 3000.0])
def test_the_limit_on_a_quadratic_is_that_of_gradient_descent(curvature: float) -> None:
    """Gradient descent on a quadratic is stable below 2 / (largest curvature).

    The gradients have noise as in training, without which the steepest direction is so near to its minimum when the rate passes
    the limit that its growth is seen late.
    """
    curvatures = curvature * np.geomspace(1e-3, 1, 20)
    x, generator = np.ones(20), np.random.default_rng(0)

    def step(rate: float) -> float:
        nonlocal x
        loss = float((curvatures * x * x).sum()) / 2 / curvature
        x = x - rate * (curvatures * x + 0.1 * curvature * generator.standard_normal(20))
        return loss

    found = range_test(step, 100, lowest=1e-4 / curvature, highest=1e3 / curvature)
    assert found.diverged
    assert 0.2 < found.limit / (2 / curvature) < 1.2
    assert found.suggested < 2 / curvature
    assert found.is_usable(found.suggested)
    assert not found.is_usable(20 / curvature)


def test_noise_of_the_loss_hardly_moves_the_limit() -> None:
    limits = []
    for seed in range(10):
        generator, x = np.random.default_rng(seed), np.ones(10)

        def step(rate: float) -> float:
            nonlocal x
            loss = float((x * x).sum()) / 2 + 1
            x = x - rate * (x + 0.1 * generator.standard_normal(10))  # noqa: B023 (called in this turn only)
            return loss * math.exp(0.1 * generator.standard_normal())  # noqa: B023

        limits.append(range_test(step, 100, 1e-4, 1e2).limit)
    assert 0.1 < np.median(limits) < 2
    assert max(limits) < 4


def test_a_loss_that_is_not_finite_ends_the_test() -> None:
    losses = iter([1.0] * 10 + [0.5] * 40 + [math.nan] * 50)
    found = range_test(lambda rate: next(losses), 100)
    assert len(found.rates) == 51
    assert found.diverged
    assert found.limit < found.rates[-1]


@pytest.mark.parametrize("shift", [0.0, -2.0, -1.0])
def test_a_loss_may_be_negative(shift: float) -> None:
    """The loss falls from 1 to 0.1 and rises again, or the same below 0 and around it, with some noise."""
    values = np.concatenate([np.geomspace(1, 0.1, 60), np.geomspace(0.1, 100, 40)])
    losses = iter(values + shift + 0.01 * np.random.default_rng(0).standard_normal(100))
    found = range_test(lambda rate: float(next(losses)), 100)
    assert found.diverged
    assert 50 < np.searchsorted(found.rates, found.limit) < 65
    assert len(found.rates) < 90


def test_a_loss_that_never_rises_gives_no_limit() -> None:
    losses = iter(np.linspace(2, 1, 50))
    found = range_test(lambda rate: float(next(losses)), 50)
    assert not found.diverged
    assert "did not rise" in found.describe(1e-3)
    assert all(found.choose(1e-3, choice) == 1e-3 for choice in ("auto", "config", "test"))


@pytest.mark.parametrize(("rate", "text"), [(1e-3, "usable"), (1e-1, "too high"), (1e-6, "low")])
def test_the_sentence_judges_the_learning_rate_of_the_config(rate: float, text: str) -> None:
    found = RangeTest((1e-6, 1e-2, 1e-1), (1.0, 0.5, 5.0), 1e-2, True)
    assert found.suggested == 3e-3
    assert text in found.describe(rate)
    assert found.choose(rate, "test") == 3e-3
    assert found.choose(rate, "config") == rate
    assert found.choose(rate, "auto") == (rate if text == "usable" else 3e-3)
