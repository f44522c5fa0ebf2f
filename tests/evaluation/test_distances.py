"""Distances between features against closed forms, scipy and loops."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from ldm.evaluation.intervals import group_of, jackknife
from ldm.evaluation.metrics import coverage, kernels
from ldm.evaluation.metrics.coverage import density_and_coverage, precision_and_recall
from ldm.evaluation.metrics.frechet import Moments, estimate, frechet_distance
from ldm.evaluation.metrics.kernels import gaussian, mmd, polynomial
from ldm.evaluation.metrics.memorisation import nearer_share, nearest

SIGMA = 10.0  # of CMMD


def by_scipy(first: np.ndarray, second: np.ndarray) -> float:
    """The published formula, on features."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real))


@given(seed=st.integers(0, 2**32 - 1), d=st.integers(1, 6))
def test_the_frechet_distance_of_gaussians_is_that_of_scipy(seed: int, d: int) -> None:
    draw = np.random.default_rng(seed)
    means = draw.standard_normal((2, d))
    covariances = [each @ each.T for each in draw.standard_normal((2, d, d + 2))]
    found = frechet_distance(*(Moments.of_gaussian(*pair) for pair in zip(means, covariances, strict=True)))
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_the_frechet_distance_of_features_is_that_of_scipy(kind: type) -> None:
    """Also of 8-bit ones, whose sums would overflow."""
    draw = np.random.default_rng(0)
    first, second = (draw.normal(mean, 30, (60, 5)).clip(0, 255).astype(kind) for mean in (100, 140))
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(by_scipy(first, second), rel=1e-5)
    found = estimate(torch.from_numpy(first), torch.from_numpy(second))
    assert found.value == pytest.approx(by_scipy(first, second), rel=1e-5)
    assert found.low < found.value < found.high


def test_the_frechet_distance_holds_for_singular_covariances() -> None:
    """Diagonal covariances commute: the distance is the sum of (s1 - s2)^2, also where some are 0."""
    first, second = np.array([4.0, 0.0, 9.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])
    found = frechet_distance(
        Moments.of_gaussian(np.zeros(4), np.diag(first)), Moments.of_gaussian(np.ones(4), np.diag(second))
    )
    assert found == pytest.approx(4 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum())


@pytest.mark.parametrize("unused", [0, 4])
def test_the_interval_of_the_frechet_distance_is_from_distances_without_each_group(unused: int) -> None:
    """Also if some features are always 0."""
    draw = np.random.default_rng(0)
    first, second = draw.standard_normal((210, 12)) + 3, 2 * draw.standard_normal((90, 12))
    first[:, :unused] = second[:, :unused] = 0
    found = estimate(torch.from_numpy(first), torch.from_numpy(second))
    moments = Moments.of(second)
    expected = jackknife(210, lambda index: frechet_distance(Moments.of(first[index]), moments))
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high), rel=1e-9 if unused == 0 else 1e-6
    )
    first[0, 0] = np.nan
    assert np.isnan(estimate(torch.from_numpy(first), torch.from_numpy(second)).value)


def test_fewer_images_than_features_are_no_exception() -> None:
    """Features in a random 3-dimensional subspace of 40 have the distance that they have within it."""
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.standard_normal((40, 3)))[0]
    first, second = draw.standard_normal((20, 3)), 2 * draw.standard_normal((25, 3)) + 1
    found = frechet_distance(Moments.of(first @ basis.T), Moments.of(second @ basis.T))
    assert found == pytest.approx(by_scipy(first, second))
    assert frechet_distance(Moments.of(first @ basis.T), Moments.of(first @ basis.T)) == pytest.approx(0, abs=1e-9)


def by_loops(x: Tensor, y: Tensor, kernel: object) -> float:
    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return float(np.mean([kernel(a, b) for a, b in pairs]))  # type: ignore[operator]

    own, other = list(itertools.permutations(x, 2)), list(itertools.permutations(y, 2))
    return mean(own) + mean(other) - 2 * mean(list(itertools.product(x, y)))


def test_kid_is_that_of_loops_and_the_mean_over_all_subsets() -> None:
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64) + 1
    k = lambda a, b: float((a @ b / 3 + 1) ** 3)  # noqa: E731
    found = mmd(x, y, polynomial).value
    assert found == pytest.approx(by_loops(x, y, k))
    subsets = [
        by_loops(x[list(i)], y[list(j)], k)
        for i in itertools.combinations(range(6), 3)
        for j in itertools.combinations(range(5), 3)
    ]
    assert found == pytest.approx(np.mean(subsets))


def test_the_interval_of_a_kernel_distance_is_from_distances_without_each_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also across chunks."""
    monkeypatch.setattr(kernels, "CHUNK", 32)
    x, y = torch.randn(75, 2, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64) + 0.5
    found = mmd(x, y, gaussian)
    group = group_of(len(x))
    without = np.array([mmd(x[torch.from_numpy(group != i)], y, gaussian).value for i in range(20)])
    error = np.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum())
    assert (found.high - found.low) / 2 == pytest.approx(2.093024054408263 * error)


def test_cmmd_of_gaussians_is_the_closed_form() -> None:
    """E k(x, y) for x ~ N(a, s I), y ~ N(b, t I): (1 + v / sigma^2)^(-d/2) exp(-|a - b|^2 / (2 (sigma^2 + v))), v = s + t."""
    d, s, t, n = 4, 60.0, 30.0, 1500
    a, b = torch.zeros(d, dtype=torch.float64), torch.full((d,), 4.0, dtype=torch.float64)

    def expected(shift: Tensor, v: float) -> float:
        return float((1 + v / SIGMA**2) ** (-d / 2) * torch.exp(-shift.square().sum() / (2 * (SIGMA**2 + v))))

    truth = expected(a - a, 2 * s) + expected(b - b, 2 * t) - 2 * expected(a - b, s + t)
    x = a + s**0.5 * torch.randn(n, d, dtype=torch.float64)
    y = b + t**0.5 * torch.randn(n, d, dtype=torch.float64)
    found, reverse = mmd(x, y, gaussian), mmd(y, x, gaussian)
    assert found.value == pytest.approx(reverse.value)
    half = np.hypot(found.high - found.value, reverse.high - reverse.value)  # both sets are random
    assert half < 0.15 * truth
    assert abs(found.value - truth) < 1.7 * half  # 3.4 standard errors
    few_x, few_y = x[:6], y[:5]
    kernel = lambda p, q: float(torch.exp(-(p - q).square().sum() / (2 * SIGMA**2)))  # noqa: E731
    assert mmd(few_x, few_y, gaussian).value == pytest.approx(by_loops(few_x, few_y, kernel))


def test_precision_recall_density_and_coverage_are_those_of_loops() -> None:
    made, true = torch.randn(30, 2, dtype=torch.float64) * 1.5, torch.randn(24, 2, dtype=torch.float64)

    def reach(points: Tensor, k: int) -> list[float]:
        return [sorted(float((p - q).norm()) for q in points)[k] for p in points]

    def inside(point: Tensor, centres: Tensor, radius: list[float]) -> int:
        return sum(float((point - c).norm()) <= r for c, r in zip(centres, radius, strict=True))

    found = precision_and_recall(made, true) | density_and_coverage(made, true)
    assert found["precision"].value == np.mean([inside(p, true, reach(true, 3)) > 0 for p in made])
    assert found["recall"].value == np.mean([inside(p, made, reach(made, 3)) > 0 for p in true])
    assert found["density"].value == pytest.approx(np.mean([inside(p, true, reach(true, 5)) / 5 for p in made]))
    covered = [any(float((p - q).norm()) <= r for q in made) for p, r in zip(true, reach(true, 5), strict=True)]
    assert found["coverage"].value == np.mean(covered)


def test_balls_contain_copies_of_the_features_that_they_reach_to() -> None:
    """Also of features far from 0, whose distances by matrix products are rounded."""
    true = torch.randn(300, 64) + 100
    made = true[torch.randperm(300)]
    distances = list(coverage.distances(made, true))
    assert int((torch.cat(distances) == 0).sum()) == 300
    found = precision_and_recall(made, true) | density_and_coverage(made, true, k=5)
    assert [found[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert found["density"].value == pytest.approx(6 / 5)


def test_their_intervals_are_those_of_the_jackknife_from_one_pass_over_the_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, true = torch.randn(90, 3, dtype=torch.float64) * 0.8, torch.randn(70, 3, dtype=torch.float64)
    names = {"recall": precision_and_recall, "coverage": density_and_coverage}
    expected = {
        name: jackknife(90, lambda index, name=name, of=of: of(made[index], true)[name].value).within(0, 1)
        for name, of in names.items()
    }
    compared, cdist = [], torch.cdist

    def counted(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        compared.append(len(x) * len(y))
        return cdist(x, y, **options)

    monkeypatch.setattr(torch, "cdist", counted)
    for name, of in names.items():
        found = of(made, true)[name]
        assert (found.value, found.low, found.high) == pytest.approx(
            (expected[name].value, expected[name].low, expected[name].high)
        )
    assert sum(compared) <= 90 * 90 + 2 * 70 * 70 + 3 * 70 * 90


def test_copies_of_training_images_are_memorised_and_new_images_are_not() -> None:
    training = torch.randn(200, 8)
    held_out = nearest(torch.randn(60, 8), training)
    copies, new = nearest(training[:50], training), nearest(torch.randn(50, 8), training)
    assert nearer_share(copies, held_out).value == 1.0
    assert nearer_share(new, held_out).contains(0.5)
    assert nearer_share(held_out, held_out).value == pytest.approx(0.5)  # ties count half
    pairs = [float(a < b) + 0.5 * float(a == b) for a in new for b in held_out]
    assert nearer_share(new, held_out).value == pytest.approx(np.mean(pairs))
