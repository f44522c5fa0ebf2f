"""Confidence intervals of measured numbers: of a mean, Wilson's of a share, and the jackknife over groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Confidence level of all intervals."""

NORMAL_QUANTILE = 1.959963984540054
"""Quantile of the standard normal distribution at (1 + LEVEL) / 2."""

RESAMPLES = 2000
"""Number of resamples of the bootstrap."""

VALUES = 2**22
"""Number of resampled values that are in memory at once."""

GROUPS = 20
"""Number of groups of the jackknife."""

FEW = 30
"""Largest number of values whose mean has the interval of Student's t distribution, for which the bootstrap's is too narrow."""


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval.

    Attributes:
        value: the number.
        low, high: limits of the interval.
        method: how the interval was computed; two intervals of different methods are not compared.
    """

    value: float
    low: float
    high: float
    method: str

    def contains(self, value: float) -> bool:
        """Return whether a value is within the interval."""
        return self.low <= value <= self.high

    def within(self, least: float = -math.inf, most: float = math.inf) -> Estimate:
        """Cut the interval to the range that the number can have."""
        return Estimate(
            self.value, min(max(self.low, least), self.value), max(min(self.high, most), self.value), self.method
        )


def mean_estimate(values: np.ndarray | Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of independent values ``[n]`` with its percentile bootstrap interval (Efron 1979).

    Of up to :data:`FEW` values the interval is that of Student's t distribution.

    Args:
        values: at least one; a single value has an interval of infinite length.
        seed: seed of the resampling.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, n = float(array.mean()), len(array)
    if n <= FEW:
        half = t_quantile((1 + LEVEL) / 2, n - 1) * float(array.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return Estimate(mean, mean - half, mean + half, "Student's t")
    generator, means = np.random.default_rng(seed), []
    rows = max(1, VALUES // n)
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(0, n, (min(rows, RESAMPLES - start), n))
        means.append(array[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), f"bootstrap of the mean, {RESAMPLES} resamples")


def wilson(hits: np.ndarray | Sequence[bool]) -> Estimate:
    """Return the share of independent hits ``[n]`` of bool with the score interval of Wilson 1927.

    Unlike the bootstrap, it is not empty if all or none are hits.
    """
    array = np.asarray(hits, dtype=bool)
    n, share, z2 = len(array), float(array.mean()), NORMAL_QUANTILE**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_QUANTILE / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), "Wilson")


def jackknife(n: int, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """Return a statistic with the interval of the jackknife over groups (Tukey 1958).

    For statistics that are smooth in the distribution of the samples but no mean of independent values. With g groups, the
    standard error is sqrt((g - 1) / g * sum over i of (T_i - mean T)^2), where T_i is the statistic without group i; the
    interval is the value plus and minus the quantile of Student's t distribution times that error. A bias of the statistic,
    which depends on the number of samples, is not removed: the interval is that of its expected value at this number.

    Args:
        n: number of samples; with fewer than ``GROUPS`` the interval is infinite.
        statistic: function of the numbers of the samples to use, ``[k]`` of int.
    """
    group, everything = group_of(n), np.arange(n)
    groups = range(GROUPS) if n >= GROUPS else ()
    return jackknife_of(statistic(everything), [statistic(everything[group != i]) for i in groups])


def jackknife_of(value: float, without: Sequence[float]) -> Estimate:
    """Return :func:`jackknife` from the statistics without each of the groups; none if there are too few samples."""
    half = math.inf
    if len(without) == GROUPS:
        array = np.asarray(without, dtype=np.float64)
        error = math.sqrt((GROUPS - 1) / GROUPS * float(np.square(array - array.mean()).sum()))
        half = t_quantile((1 + LEVEL) / 2, GROUPS - 1) * error
    half = half if math.isfinite(half) else math.inf
    return Estimate(value, value - half, value + half, f"jackknife over {GROUPS} random groups")


def group_of(n: int) -> np.ndarray:
    """Return the group of each of ``n`` samples, ``[n]`` of int: random, since the order of the samples may have a period."""
    found: np.ndarray = np.random.default_rng(0).permutation(n) % GROUPS
    return found


@functools.cache
def t_quantile(share: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution for a share in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while t_share(high, degrees) < share:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, degrees) < share else (low, middle)
    return (low + high) / 2


def t_share(t: float, degrees: int) -> float:
    """Return the distribution function of Student's t at ``t`` >= 0 (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    square, term, total = math.cos(angle) ** 2, 1.0, 0.0
    if degrees % 2:
        term = math.cos(angle)
        for k in range(1, degrees - 1, 2):
            total += term
            term *= square * (k + 1) / (k + 2)
        return 0.5 + (angle + math.sin(angle) * total) / math.pi
    for k in range(0, degrees - 1, 2):
        total += term
        term *= square * (k + 1) / (k + 2)
    return 0.5 + math.sin(angle) * total / 2
