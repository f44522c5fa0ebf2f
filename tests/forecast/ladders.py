"""Ladders of runs with known scaling curves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ldm.forecast.bands import FALL_SPREAD
from ldm.forecast.curves import log_loss

LAST = 1 / 18
"""Steps of the longest run, as a share of those of the full run."""

RUNS = [
    (0.25, 1, LAST / 4), (0.25, 1, LAST / 2), (0.25, 1, LAST), (0.56, 1, LAST), (1, 1, LAST / 4), (1, 1, LAST / 2),
    (1, 1, LAST), (0.25, 0.5, LAST), (0.25, 0.25, LAST), (0.25, 1, LAST / 4), (0.25, 1, LAST / 2), (0.25, 0.25, LAST / 2),
]  # fmt: skip
"""Parameters, images and steps of the runs, as shares of those of the full run; two runs are repeated."""


class Simulated(NamedTuple):
    """Runs of many ladders: quantities ``[n k]``, losses ``[s n]``, costs ``[n]``, and parameters ``[s p]``."""

    log_ratios: np.ndarray
    losses: np.ndarray
    costs: np.ndarray
    parameters: np.ndarray


def simulate(parameters: np.ndarray, noise: float, seed: int, runs: object = RUNS) -> Simulated:
    """Draw the losses of a ladder for each row of parameters, with lognormal noise."""
    log_ratios = np.log(np.array(runs, dtype=float))
    exact = log_loss(parameters, log_ratios)
    losses = np.exp(exact + noise * np.random.default_rng(seed).standard_normal(exact.shape))
    return Simulated(log_ratios, losses, np.exp(log_ratios[:, 0] + log_ratios[:, 2]), parameters)


def full_losses(ladder: Simulated, noise: float, seed: int) -> np.ndarray:
    """Draw the loss of the full run of each ladder; beyond the runs it falls by a lognormal factor more than the curve."""
    generator = np.random.default_rng(seed)
    expected, lowest = log_loss(ladder.parameters, np.zeros((1, 3)))[:, 0], np.log(ladder.losses).min(-1)
    count = len(expected)
    fall = np.minimum(expected - lowest, 0) * np.exp(FALL_SPREAD * generator.standard_normal(count))
    losses: np.ndarray = np.exp(np.maximum(expected, lowest) + fall + noise * generator.standard_normal(count))
    return losses


def population(count: int, seed: int) -> np.ndarray:
    """Draw parameters of scaling curves: floors of 0.1 to 0.5, terms of 0.01 to 0.1, exponents of 0.15 to 0.7."""
    generator = np.random.default_rng(seed)
    parts = [
        generator.uniform(low, high, (count, k)) for low, high, k in ((0.1, 0.5, 1), (0.01, 0.1, 3), (0.15, 0.7, 3))
    ]
    return np.log(np.concatenate(parts, axis=1))
