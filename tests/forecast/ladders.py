"""Ladders of runs with known scaling curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm.forecast.answers import longest_runs
from ldm.forecast.curves import log_loss
from ldm.forecast.plan import FULL, MIDDLE, SMALL, Extras, Rung, Size, make_plan

SIZES = {
    SMALL: Size(270_000, 0.06, 32),
    MIDDLE: Size(1_000_000, 0.15, 32),
    FULL: Size(4_000_000, 0.35, 32),
}
EXTRAS = Extras(overhead=5, validated=192, evaluations=3000)
IMAGES, STEPS = 3434, 80_000

FALL = 0.35
"""Standard deviation of the logarithm of the factor on how far the loss falls beyond the runs."""


def rungs(steps: int) -> Sequence[Rung]:
    """Return the ladder of a full run of so many steps."""
    return make_plan(Rung(FULL, IMAGES, steps), SIZES, EXTRAS).rungs


def shares(steps: int) -> list[tuple[float, float, float]]:
    """Return parameters, images and steps of its runs, as shares of those of the full run."""
    full = SIZES[FULL].parameters
    return [(SIZES[each.width].parameters / full, each.images / IMAGES, each.steps / steps) for each in rungs(steps)]


RUNS = shares(STEPS)
LONGEST = longest_runs(rungs(STEPS))
LAST = max(steps for *_, steps in RUNS)
"""Steps of the longest run, as a share of those of the full run."""


class Simulated(NamedTuple):
    """Runs of many ladders: quantities ``[n k]``, losses ``[s n]``, and parameters ``[s p]``."""

    log_ratios: np.ndarray
    losses: np.ndarray
    parameters: np.ndarray


def simulate(parameters: np.ndarray, noise: float, seed: int, runs: object = RUNS) -> Simulated:
    """Draw the losses of a ladder for each row of parameters, with lognormal noise."""
    log_ratios = np.log(np.array(runs, dtype=float))
    exact = log_loss(parameters, log_ratios)
    losses = np.exp(exact + noise * np.random.default_rng(seed).standard_normal(exact.shape))
    return Simulated(log_ratios, losses, parameters)


def full_losses(ladder: Simulated, noise: float, seed: int, plateau_fall: float = 1.0) -> np.ndarray:
    """Draw the loss of the full run of each ladder; beyond the runs its fall has a lognormal factor.

    Its median is ``plateau_fall`` to the power of the plateau's share of the longest run, for curves with an offset and a gain.
    """
    generator = np.random.default_rng(seed)
    expected, lowest = log_loss(ladder.parameters, np.zeros((1, 3)))[:, 0], np.log(ladder.losses).min(-1)
    count = len(expected)
    factor = np.exp(FALL * generator.standard_normal(count))
    if plateau_fall != 1:
        offset, gain = np.exp(ladder.parameters[:, -2:].T)
        longest = np.exp(ladder.log_ratios[:, 2] + gain[:, None] * ladder.log_ratios[:, 0]).max(-1)
        factor *= plateau_fall ** (offset / (offset + longest))
    fall = np.minimum(expected - lowest, 0) * factor
    losses: np.ndarray = np.exp(np.maximum(expected, lowest) + fall + noise * generator.standard_normal(count))
    return losses


def population(count: int, seed: int) -> np.ndarray:
    """Draw parameters of scaling curves: floors of 0.1 to 0.5, terms of 0.01 to 0.1, exponents of 0.15 to 0.7."""
    generator = np.random.default_rng(seed)
    parts = [
        generator.uniform(low, high, (count, k)) for low, high, k in ((0.1, 0.5, 1), (0.01, 0.1, 3), (0.15, 0.7, 3))
    ]
    return np.log(np.concatenate(parts, axis=1))
