"""Power-function profiles of averaged weights, and their reconstruction from stored averages (EDM2).

Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C. The average of the weights w after step t has the profile

    p(tau) = (g + 1) tau^g / t^(g + 1),    tau in [0, t]

over the steps tau, so that its width grows with the training. The *length* of a profile is its standard deviation as a share
of t, which g determines: 0.05 averages over about the last tenth of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

LONGEST = 12**-0.5
"""Length of the profile with g = 0, the mean of all weights; those of exponents above 0 are shorter."""


class Profile(NamedTuple):
    """Profile of an average: the step after which it was taken, and its length, in (0, :data:`LONGEST`)."""

    step: int
    length: float


@cache
def exponent(length: float) -> float:
    """Return g of a length: the positive root of length = sqrt(g + 1) / ((g + 2) sqrt(g + 3))."""
    variance = length**-2
    roots = np.roots([1, 7, 16 - variance, 12 - variance])
    return float(roots.real.max())


def decay(length: float, step: int) -> float:
    """Return b of average <- b average + (1 - b) weights at a step, from 1: (1 - 1 / step)^(g + 1)."""
    return (1 - 1 / step) ** (exponent(length) + 1)


def inner_product(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles."""
    a, b = sorted((a, b), key=lambda each: each.step)
    g, h = exponent(a.length), exponent(b.length)
    return (g + 1) * (h + 1) * (a.step / b.step) ** h / ((g + h + 1) * b.step)


def coefficients(stored: Sequence[Profile], target: Profile) -> np.ndarray:
    """Return the factors of stored averages whose sum has the profile that is closest to ``target``, in the mean square.

    The solution x of A x = b, with the inner products of the stored profiles in A and those with the target in b, divided by its
    sum, so that weights that never changed stay what they are.
    """
    solution: np.ndarray = np.linalg.solve(_products(stored), [inner_product(each, target) for each in stored])
    return solution / solution.sum()


def distance(stored: Sequence[Profile], factors: np.ndarray, target: Profile) -> float:
    """Return the distance in the mean square of a sum of stored averages from a profile, relative to that profile."""
    norm = inner_product(target, target)
    cross = factors @ np.array([inner_product(each, target) for each in stored])
    return float(np.sqrt(max(0.0, factors @ _products(stored) @ factors - 2 * cross + norm) / norm))


def _products(stored: Sequence[Profile]) -> np.ndarray:
    return np.array([[inner_product(a, b) for b in stored] for a in stored])
