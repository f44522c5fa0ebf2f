"""Plan of a ladder: which small runs are trained, so that all of them together take a given part of the full run.

The runs differ from the full run in three quantities: width of the network, number of images, number of steps. The longest runs
of all widths take equal times, so that a narrow network has many steps, since the steps are what is extrapolated farthest. How
many they are is what the time allows. Each run has a learning-rate schedule of its own that ends at its last step, since the
loss in the middle of a longer schedule is higher than that at the end of a shorter one (Hoffmann et al. 2022, arXiv 2203.15556,
section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ldm.errors import ConfigError
from ldm.training.subruns import VALIDATIONS

SHARE = 0.2
"""Largest part of the time of the full run that the ladder may take."""

MARGIN = 0.9
"""Part of that time that is planned, since no estimate is exact."""

OVERHEAD_SHARE = 0.5
"""Largest part of the time of a ladder in which nothing is trained; a shorter ladder has fewer runs."""

FEWEST_RUNS, FEWEST_STEPS = 5, 8
"""Least number of runs, and of steps of a run."""

SHORTEST = 4 * FEWEST_STEPS
"""Least number of steps of the longest run, so that those of fewer steps of the narrowest network differ from each other."""

LONG = 1000
"""Steps of the longest run from which on a ladder has more runs instead of longer ones; shorter ones may see the plateau alone at
which a training begins (:mod:`ldm.forecast.curves`)."""

SMALL, MIDDLE, FULL = 0.25, 0.5, 1.0
"""Widths of the networks, as shares of that of the full run."""


@dataclass(frozen=True)
class Rung:
    """One run of a ladder.

    Attributes:
        width: width of the network as a share of that of the full run.
        images: number of training images.
        steps: number of optimizer steps.
        seed: number that is added to the seed of the experiment.
    """

    width: float
    images: int
    steps: int
    seed: int = 0

    def __str__(self) -> str:
        again = f", seed + {self.seed}" if self.seed else ""
        return f"width {self.width:g}, {self.images:,} images, {self.steps:,} steps{again}"


TEMPLATE = (
    (SMALL, 1, 1, 0),
    (SMALL, 1, 1 / 4, 0),
    (FULL, 1, 1, 0),
    (SMALL, 1 / 4, 1, 0),
    (MIDDLE, 1, 1, 0),
    (SMALL, 1, 1 / 2, 0),
    (MIDDLE, 1, 1 / 4, 0),
    (FULL, 1, 1 / 2, 0),
    (SMALL, 1 / 2, 1, 0),
    (SMALL, 1, 1 / 4, 1),
    (MIDDLE, 1 / 4, 1, 0),
    (SMALL, 1, 1 / 2, 1),
)
"""Runs, the most important first: width, share of the images, share of the time of the longest run, and added to the seed."""


@dataclass(frozen=True)
class Size:
    """A network of the ladder, and what it costs on this machine.

    Attributes:
        parameters: number of trained parameters.
        seconds: time of an optimizer step.
        batch: samples of a step.
    """

    parameters: int
    seconds: float
    batch: int

    @property
    def forward(self) -> float:
        """Time in which a sample goes through the network once, a third of what training on it takes."""
        return self.seconds / (3 * self.batch)


@dataclass(frozen=True)
class Extras:
    """Costs of a run besides its steps.

    Attributes:
        overhead: time in which a run starts and ends, in seconds.
        validated: images of a validation.
        evaluations: passes of a sample through the network that measure the recall of a run; 0 if it is not measured.
    """

    overhead: float
    validated: int
    evaluations: int = 0


@dataclass(frozen=True)
class Plan:
    """A ladder, with what its runs and the full run take.

    Attributes:
        full: the full run.
        rungs: the runs, the most important first.
        seconds: predicted time of each run.
        full_seconds: predicted time of the full run.
        limit: time that the ladder may take.
        evaluations: passes of a sample through the network that measure the recall of a run; 0 if there is no time for that.
    """

    full: Rung
    rungs: Sequence[Rung]
    seconds: Sequence[float]
    full_seconds: float
    limit: float
    evaluations: int = 0


def seconds_of(rung: Rung, sizes: Mapping[float, Size], extras: Extras) -> float:
    """Return the predicted time of a run, with its validations and the measurement of its recall."""
    size = sizes[rung.width]
    passes = VALIDATIONS * extras.validated + extras.evaluations
    return extras.overhead + rung.steps * size.seconds + passes * size.forward


def make_plan(
    full: Rung,
    sizes: Mapping[float, Size],
    extras: Extras,
    *,
    subsets: bool = True,
    share: float = SHARE,
    spent: float = 0.0,
) -> Plan:
    """Return the ladder with the most runs that the time allows, and of these the one with the longest.

    If the longest run would have fewer than ``LONG`` steps, there are fewer runs. If there is no time for a ladder otherwise, the
    recall is not measured.

    Args:
        full: the full run.
        sizes: networks by their width; the next larger one stands for ``SMALL`` or ``MIDDLE`` if it is missing.
        extras: what a run costs besides its steps.
        subsets: whether runs can be trained on a part of the images.
        share: part of the time of the full run that the ladder may take.
        spent: seconds of it that were spent before, on measurements.

    Raises:
        ConfigError: the full run is too short for a ladder.
    """
    full_seconds = full.steps * sizes[FULL].seconds
    limit = share * full_seconds
    for count in range(len(TEMPLATE), FEWEST_RUNS - 1, -1):
        longest = _longest(full, count, sizes, extras, subsets, MARGIN * limit - spent)
        if longest is None:
            continue
        rungs = _rungs(full, count, longest, sizes, subsets)
        seconds = [seconds_of(rung, sizes, extras) for rung in rungs]
        idle = sum(seconds) - sum(rung.steps * sizes[rung.width].seconds for rung in rungs)
        if (idle <= OVERHEAD_SHARE * sum(seconds) and longest >= LONG) or count == FEWEST_RUNS:
            return Plan(full, rungs, seconds, full_seconds, limit, extras.evaluations)
    if extras.evaluations:
        without = replace(extras, evaluations=0)
        return make_plan(full, sizes, without, subsets=subsets, share=share, spent=spent)
    shortest = _rungs(full, FEWEST_RUNS, SHORTEST, sizes, subsets)
    least = sum(seconds_of(rung, sizes, extras) for rung in shortest)
    least = (least + spent) / MARGIN
    raise ConfigError(
        f"the full run takes {full_seconds:,.0f} s, of which {limit:,.0f} s are for the ladder, but the shortest ladder takes "
        f"{least:,.0f} s; give a --budget of at least {math.ceil(1.02 * least / share)} s, or train the full run itself."
    )


def _rungs(full: Rung, count: int, longest: int, sizes: Mapping[float, Size], subsets: bool) -> list[Rung]:
    """Return the first ``count`` distinct runs of the template, for this number of steps of the longest."""
    rungs: list[Rung] = []
    narrowest = sizes[min(sizes)]
    for width, images, time, seed in TEMPLATE:
        if images < 1 and not subsets:
            continue
        width = min(each for each in sizes if each >= width)
        steps = longest * min(1, narrowest.seconds / sizes[width].seconds) * time
        multiple = VALIDATIONS  # so that the last step is validated
        rounded = max(FEWEST_STEPS, int(steps) // multiple * multiple)
        rungs.append(Rung(width, max(1, round(images * full.images)), rounded, seed))
    return list(dict.fromkeys(rungs))[:count]


def _longest(
    full: Rung, count: int, sizes: Mapping[float, Size], extras: Extras, subsets: bool, limit: float
) -> int | None:
    """Return the largest number of steps of the longest run with which the ladder keeps the limit; None if there is none."""

    def fits(longest: int) -> bool:
        return sum(seconds_of(rung, sizes, extras) for rung in _rungs(full, count, longest, sizes, subsets)) <= limit

    low, high = SHORTEST, full.steps
    if not fits(low):
        return None
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
