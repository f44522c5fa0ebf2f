"""Confidence intervals of measured numbers: of a mean, Wilson's of a share, and the jackknife over groups."""

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

# fmt: off
T_QUANTILES = (
    12.70620474, 4.30265273, 3.18244631, 2.77644511, 2.57058184, 2.44691185, 2.36462425, 2.30600414,
    2.26215716, 2.22813885, 2.20098516, 2.17881283, 2.16036866, 2.14478669, 2.13144955, 2.11990530,
    2.10981558, 2.10092204, 2.09302405, 2.08596345, 2.07961384, 2.07387307, 2.06865761, 2.06389856,
    2.05953855, 2.05552944, 2.05183052, 2.04840714, 2.04522964,
)
# fmt: on
"""Quantiles of Student's t distribution at (1 + LEVEL) / 2, the first for one degree of freedom."""


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

    Of up to 30 values, for which that is too narrow, the interval is that of Student's t distribution.

    Args:
        values: at least one; a single value has an interval of infinite length.
        seed: seed of the resampling.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, freedom = float(array.mean()), len(array) - 1
    if freedom <= len(T_QUANTILES):
        error = float(array.std(ddof=1)) / math.sqrt(len(array)) if freedom else math.inf
        half = T_QUANTILES[max(freedom, 1) - 1] * error
        return Estimate(mean, mean - half, mean + half, "Student's t")
    generator, means = np.random.default_rng(seed), []
    rows = max(1, VALUES // len(array))
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(0, len(array), (min(rows, RESAMPLES - start), len(array)))
        means.append(array[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Rounding of the sums must not put the mean of equal values outside of its interval.
    low, high = min(float(low), mean), max(float(high), mean)
    return Estimate(mean, low, high, f"bootstrap of the mean, {RESAMPLES} resamples")


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
        half = T_QUANTILES[GROUPS - 2] * math.sqrt((GROUPS - 1) / GROUPS * float(np.square(array - array.mean()).sum()))
    half = half if math.isfinite(half) else math.inf
    return Estimate(value, value - half, value + half, f"jackknife over {GROUPS} groups")


def group_of(n: int) -> np.ndarray:
    """Return the group of each of ``n`` samples, ``[n]`` of int: sample i is in group ``i % GROUPS``."""
    return np.arange(n) % GROUPS
