"""Fixed ranges of noise levels, by which training and validation report the denoising loss.

The ranges are the same for all schedules, so that runs can be compared: half a decade of sigma each, from 0.01 to 100, and one
range on either side.
"""

from __future__ import annotations

import itertools

import numpy as np

EDGES = 10.0 ** np.arange(-2, 2.5, 0.5)
"""Limits between the ranges, increasing."""

_LIMITS = ["0", *(f"{float(f'{edge:.2g}'):g}" for edge in EDGES), "inf"]

NAMES = tuple(f"sigma_{low}_{high}" for low, high in itertools.pairwise(_LIMITS))
"""Names of the ranges, such as ``sigma_0.1_0.32``."""


def add_to_bins(sums: np.ndarray, values: np.ndarray, sigma: np.ndarray) -> None:
    """Add each value to the sum, and 1 to the count, of the range of its noise level, in order.

    Args:
        sums: sums and counts ``[2 len(NAMES)]``, changed in place.
        values, sigma: ``[n]``.
    """
    index = np.digitize(sigma, EDGES)
    np.add.at(sums[0], index, values)
    np.add.at(sums[1], index, 1)


def means(name: str, sums: np.ndarray) -> dict[str, float]:
    """Return the mean of each range that has a value, as ``<name>_<range>``."""
    return {f"{name}_{part}": total / count for part, total, count in zip(NAMES, *sums.tolist(), strict=True) if count}
