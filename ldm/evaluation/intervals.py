"""Confidence intervals of measured numbers: bootstrap, Wilson's interval of a share, and the jackknife over groups."""

from __future__ import annotations

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

T_QUANTILE = 2.093024054408263
"""Quantile of Student's t distribution with ``GROUPS - 1`` degrees of freedom at (1 + LEVEL) / 2."""


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


def bootstrap(values: np.ndarray | Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of independent values ``[n]`` with its percentile bootstrap interval (Efron 1979).

    Args:
        values: at least one; a single value has an interval of infinite length.
        seed: seed of the resampling.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, method = float(array.mean()), f"bootstrap of the mean, {RESAMPLES} resamples"
    if len(array) < 2:
        return Estimate(mean, -math.inf, math.inf, method)
    generator, means = np.random.default_rng(seed), []
    rows = max(1, VALUES // len(array))
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(0, len(array), (min(rows, RESAMPLES - start), len(array)))
        means.append(array[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Rounding of the sums must not put the mean of equal values outside of its interval.
    return Estimate(mean, min(float(low), mean), max(float(high), mean), method)


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
        half = T_QUANTILE * math.sqrt((GROUPS - 1) / GROUPS * float(np.square(array - array.mean()).sum()))
    half = half if math.isfinite(half) else math.inf
    return Estimate(value, value - half, value + half, f"jackknife over {GROUPS} groups")


def group_of(n: int) -> np.ndarray:
    """Return the group of each of ``n`` samples, ``[n]`` of int: sample i is in group ``i % GROUPS``."""
    return np.arange(n) % GROUPS
