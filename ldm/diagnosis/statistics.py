"""Tests that decide whether a measured difference is one, from the spread over samples instead of fixed thresholds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SIGNIFICANT = 4.0
"""Number of standard errors from which a difference counts.

A healthy run exceeds it by chance once in 30,000 tests (normal distribution, one side), so that the tens of tests of one
diagnosis together raise a false alarm in fewer than one of 300 runs.
"""

CONSISTENT = 2.0
"""Number of standard errors below which a measurement counts as consistent with no effect."""


class Comparison(NamedTuple):
    """Comparison of two means.

    Attributes:
        first, second: the means.
        z: their difference, first minus second, in standard errors.
        error: standard error of the difference.
    """

    first: float
    second: float
    z: float
    error: float

    @property
    def is_greater(self) -> bool:
        """True if the first is significantly greater."""
        return self.z > SIGNIFICANT

    @property
    def ratio(self) -> float:
        """First over second."""
        return self.first / self.second if self.second else math.inf


def paired(first: Tensor, second: Tensor) -> Comparison:
    """Compare values ``[n]`` that were measured on the same samples with the same noise."""
    first, second = first.double(), second.double()
    difference = first - second
    error = _standard_error(difference)
    return Comparison(float(first.mean()), float(second.mean()), _ratio(float(difference.mean()), error), error)


def unpaired(first: Tensor, second: Tensor) -> Comparison:
    """Compare values ``[n]`` and ``[m]`` of independent samples (Welch)."""
    first, second = first.double(), second.double()
    error = math.hypot(_standard_error(first), _standard_error(second))
    return Comparison(
        float(first.mean()), float(second.mean()), _ratio(float(first.mean() - second.mean()), error), error
    )


def dependence(first: Tensor, second: Tensor, generator: torch.Generator, permutations: int = 200) -> float:
    """Return how far two kernels ``[n n]`` of the same samples are from independence, in standard deviations.

    The Hilbert-Schmidt independence criterion (Gretton et al. 2005), tr(K H L H), against its distribution under random
    permutations of the samples, which needs no assumption on the kernels.
    """
    n = len(first)
    centred = first - first.mean(0) - first.mean(1, keepdim=True) + first.mean()
    observed = float((centred * second).sum())
    shuffled = []
    for _ in range(permutations):
        order = torch.randperm(n, generator=generator)
        shuffled.append(float((centred * second[order][:, order]).sum()))
    values = torch.tensor(shuffled, dtype=torch.float64)
    return _ratio(observed - float(values.mean()), float(values.std()))


def _standard_error(values: Tensor) -> float:
    return float(values.std(unbiased=True)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _ratio(difference: float, error: float) -> float:
    return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
