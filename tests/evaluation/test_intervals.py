from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binomtest, t

from ldm.evaluation.intervals import FEW, GROUPS, Estimate, group_of, jackknife, mean_estimate, t_quantile, wilson
from ldm.evaluation.metrics.contrastive import best_scale, calibration_error
from ldm.evaluation.metrics.coverage import DENSITY_K, balls_around, density_and_coverage, precision_and_recall, radii
from ldm.evaluation.metrics.diversity import mean_pairwise_distance
from ldm.evaluation.metrics.frechet import Moments, estimate, frechet_distance
from ldm.evaluation.metrics.kernels import gaussian, mmd, polynomial
from ldm.evaluation.metrics.latents import estimates
from ldm.evaluation.metrics.memorisation import nearer_share, nearest

REPEATS = 200
SIGMA = 10.0  # of CMMD

MEAN, COVARIANCE = np.array([1.0, 0.0, 0.5]), np.diag([2.0, 1.0, 0.5])


def _features(draw: np.random.Generator, n: int) -> np.ndarray:
    return MEAN + draw.standard_normal((n, 3)) * np.sqrt(np.diag(COVARIANCE))


REFERENCE = torch.from_numpy(np.random.default_rng(7).standard_normal((80, 3)))


def _frechet(draw: np.random.Generator) -> Estimate:
    return estimate(torch.from_numpy(_features(draw, 400)), REFERENCE)


def _kernel(kernel: Callable[..., torch.Tensor]) -> Callable[[np.random.Generator], Estimate]:
    return lambda draw: mmd(torch.from_numpy(_features(draw, 300)), REFERENCE, kernel)


def _polynomial_mean(y: np.ndarray) -> np.ndarray:
    """E (x.y/d + 1)^3 over the features x, for each y: the third moment of a normal variable."""
    centre, variance = y @ MEAN / 3 + 1, y**2 @ np.diag(COVARIANCE) / 9
    return centre**3 + 3 * centre * variance


def _gaussian_mean(y: np.ndarray) -> np.ndarray:
    """E exp(-|x - y|^2 / (2 sigma^2)) over the features x, for each y."""
    width = SIGMA**2 + np.diag(COVARIANCE)
    return np.exp(-((y - MEAN) ** 2 / (2 * width)).sum(1)) * SIGMA**3 / np.sqrt(width.prod())


def _kernel_truth(kernel: Callable[..., torch.Tensor], mean: Callable[[np.ndarray], np.ndarray]) -> float:
    """The expected value for the same reference; E k(x, x') is the mean of the closed form over many x'."""
    pairs = kernel(REFERENCE, REFERENCE).numpy()
    within = pairs[~np.eye(len(pairs), dtype=bool)].mean()
    own = mean(_features(np.random.default_rng(5), 400_000)).mean()
    return float(own + within - 2 * mean(REFERENCE.numpy()).mean())


def _density(draw: np.random.Generator) -> Estimate:
    made = torch.from_numpy(_features(draw, 100))
    return density_and_coverage(made, REFERENCE)["density"]


def _density_truth() -> float:
    made = torch.from_numpy(_features(np.random.default_rng(5), 20_000))
    return float(balls_around(made, REFERENCE, radii(REFERENCE, DENSITY_K)).double().mean()) / DENSITY_K


def _manifold(name: str) -> Callable[[np.random.Generator], Estimate]:
    measures = precision_and_recall if name in ("precision", "recall") else density_and_coverage
    return lambda draw: measures(torch.from_numpy(_features(draw, 100)), REFERENCE)[name]


HELD_OUT = nearest(torch.from_numpy(np.random.default_rng(8).standard_normal((60, 3))), REFERENCE)
CAPTIONS = F.normalize(torch.from_numpy(np.random.default_rng(9).standard_normal((30, 8))), dim=1)


def _memorisation(draw: np.random.Generator) -> Estimate:
    return nearer_share(nearest(torch.from_numpy(_features(draw, 100)), REFERENCE), HELD_OUT)


def _cosines(draw: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of images that are their captions with noise, and the numbers of the captions."""
    target = torch.from_numpy(draw.integers(0, len(CAPTIONS), 200))
    images = F.normalize(CAPTIONS[target] + 0.5 * torch.from_numpy(draw.standard_normal((200, 8))), dim=1)
    return images @ CAPTIONS.T, target


def _logit_scale(draw: np.random.Generator) -> Estimate:
    return best_scale(*_cosines(draw))


def _calibration_error(draw: np.random.Generator) -> Estimate:
    return calibration_error(*_cosines(draw), scale=12.0)


MIXING = np.linalg.cholesky([[1.2, 0.5, 0.1], [0.5, 1.0, -0.2], [0.1, -0.2, 0.8]])


def _latents(name: str) -> Callable[[np.random.Generator], Estimate]:
    """A statistic of latents of 3 correlated channels and 16 positions, half of whose variance is between images."""

    def measure(draw: np.random.Generator) -> Estimate:
        normal = draw.standard_normal((100, 1, 3)) + draw.standard_normal((100, 16, 3))
        x = np.array([0.3, -0.1, 0.0]) + normal @ MIXING.T / math.sqrt(2)
        products = np.einsum("npi,npj->nij", x, x).reshape(100, 9) / 16
        table = np.concatenate([x.mean(1), 0.05 * draw.gamma(4, 0.25, (100, 3)), products], axis=1)
        return estimates(torch.from_numpy(table))[name]

    return measure


LATENTS = ("latent_mean", "latent_std_min", "latent_std_max", "latent_correlation", "latent_noise")


def _mean_of(measure: Callable[[np.random.Generator], Estimate]) -> Callable[[], float]:
    """The expected value, from other repeats, where it has no closed form."""
    return lambda: float(np.mean([measure(np.random.default_rng([11, repeat])).value for repeat in range(REPEATS)]))


CASES: dict[str, tuple[Callable[[np.random.Generator], Estimate], Callable[[], float]]] = {
    "mean of exponential values": (lambda draw: mean_estimate(draw.exponential(size=150)), lambda: 1.0),
    "mean of 60 gamma values": (lambda draw: mean_estimate(draw.gamma(2.0, 0.1, 60)), lambda: 0.2),
    "mean of 8 gamma values": (lambda draw: mean_estimate(draw.gamma(2.0, 0.1, 8)), lambda: 0.2),
    "mean of 8 normal values": (lambda draw: mean_estimate(draw.standard_normal(8)), lambda: 0.0),
    "share of 20 %": (lambda draw: wilson(draw.random(60) < 0.2), lambda: 0.2),
    "share of 99 %": (lambda draw: wilson(draw.random(200) < 0.99), lambda: 0.99),
    "Fréchet distance": (
        _frechet,
        lambda: frechet_distance(Moments.of_gaussian(MEAN, COVARIANCE), Moments.of(REFERENCE.numpy())),
    ),
    "KID": (_kernel(polynomial), lambda: _kernel_truth(polynomial, _polynomial_mean)),
    "CMMD": (_kernel(gaussian), lambda: _kernel_truth(gaussian, _gaussian_mean)),
    "density": (_density, _density_truth),
    **{name: (_manifold(name), _mean_of(_manifold(name))) for name in ("precision", "recall", "coverage")},
    "memorisation": (_memorisation, _mean_of(_memorisation)),
    "logit scale": (_logit_scale, _mean_of(_logit_scale)),
    "calibration error": (_calibration_error, _mean_of(_calibration_error)),
    **{name: (_latents(name), _mean_of(_latents(name))) for name in LATENTS},
}


@pytest.mark.parametrize("name", CASES)
def test_intervals_cover_the_truth_in_90_to_98_percent(name: str) -> None:
    measure, truth = CASES[name]
    expected = truth()
    generators = (np.random.default_rng([zlib.crc32(name.encode()), repeat]) for repeat in range(REPEATS))
    covered = sum(measure(each).contains(expected) for each in generators)
    assert 0.90 * REPEATS <= covered <= 0.98 * REPEATS


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_the_interval_of_the_mean_of_few_values_is_that_of_scipy(values: list[float]) -> None:
    found = mean_estimate(values)
    low, high = t.interval(0.95, len(values) - 1, np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values)))
    assume(high > low)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (5, 12), (12, 12), (180, 192)])
def test_the_interval_of_a_share_is_that_of_scipy(hits: int, n: int) -> None:
    found = wilson(np.arange(n) < hits)
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_jackknife_of_a_mean_of_equal_groups_is_the_standard_error_of_the_group_means() -> None:
    values = np.random.default_rng(0).standard_normal(10 * GROUPS)
    found = jackknife(len(values), lambda index: float(values[index].mean()))
    means = np.array([values[group_of(len(values)) == i].mean() for i in range(GROUPS)])
    error = means.std(ddof=1) / np.sqrt(GROUPS)
    assert (found.high - found.low) / 2 == pytest.approx(t.ppf(0.975, GROUPS - 1) * error)


def test_the_jackknife_does_not_depend_on_a_period_of_the_samples() -> None:
    """Images of ten classes in turn have such a period."""
    values = np.tile(np.arange(10.0), 40)
    found = jackknife(len(values), lambda index: float(values[index].mean()))
    assert (found.high - found.low) / 2 == pytest.approx(2 * values.std() / np.sqrt(len(values)), rel=0.4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30])
def test_quantiles_of_t_are_those_of_scipy(degrees: int) -> None:
    for share in (0.6, 0.9, 0.975, 0.999):
        assert t_quantile(share, degrees) == pytest.approx(t.ppf(share, degrees), rel=1e-9)


def test_too_few_samples_have_no_finite_interval() -> None:
    assert mean_estimate([1.0]).contains(1e9)
    assert jackknife(GROUPS - 1, lambda index: float(len(index))).contains(-1e9)


def test_a_constant_is_within_its_interval() -> None:
    for n in (FEW, FEW + 1, 500):
        found = mean_estimate(np.full(n, 0.1))
        assert found.contains(found.value)
        assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_the_mean_pairwise_distance_is_that_of_a_loop() -> None:
    features = torch.randn(6, 4, dtype=torch.float64)
    unit = features / features.norm(dim=1, keepdim=True)
    pairs = [float(1 - unit[i] @ unit[j]) for i in range(6) for j in range(6) if i != j]
    assert mean_pairwise_distance(features) == pytest.approx(np.mean(pairs))
    assert mean_pairwise_distance(features[:1].expand(4, -1)) == pytest.approx(0)
