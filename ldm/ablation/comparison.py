"""Numbers of each recipe over the seeds, their differences to ``plain`` paired by seed, and what follows from these.

The runs of one seed have the same initial weights, order of the data and noise, as far as the recipe leaves them alone, so the
differences within seeds vary less than the numbers. Their mean over n seeds has the interval of Student's t distribution with
n - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from ldm.ablation.metrics import LEVELS, METRICS, mean_error
from ldm.ablation.recipes import PLAIN
from ldm.ablation.runs import Record
from ldm.evaluation.intervals import LEVEL, t_quantile


@dataclass(frozen=True)
class Spread:
    """A number of a recipe over the seeds.

    Attributes:
        values: value of each seed.
        better: ``higher``, ``lower`` or ``neither``.
        unit: its unit; empty for none.
    """

    values: Mapping[int, float]
    better: str
    unit: str = ""

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Standard deviation over the seeds; None for one seed."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def low(self) -> float:
        return min(self.values.values())

    @property
    def high(self) -> float:
        return max(self.values.values())


@dataclass(frozen=True)
class Difference:
    """Difference of a number to that of ``plain``, paired by seed.

    Attributes:
        mean: mean over the seeds that both have.
        low, high: limits of its interval; None with one seed.
        seeds: number of these seeds.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Row:
    """A recipe in the comparison.

    Attributes:
        recipe: its name.
        overrides: its changes of the config.
        steps: steps of each run.
        ratio: steps over those of ``plain``.
        numbers: what was measured, by name.
        differences: their differences to ``plain``.
        finished, diverged, open: numbers of runs.
        verdict: ``better``, ``worse``, ``no difference seen``, or why there is none.
    """

    recipe: str
    overrides: Sequence[str]
    steps: int
    ratio: float
    numbers: Mapping[str, Spread]
    differences: Mapping[str, Difference]
    finished: int
    diverged: int
    open: int
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Return values of JSON."""
        numbers = {
            name: {
                "mean": each.mean,
                "std": each.std,
                "min": each.low,
                "max": each.high,
                "better": each.better,
                "unit": each.unit,
                "seeds": {str(seed): value for seed, value in each.values.items()},
            }
            for name, each in self.numbers.items()
        }
        return {**asdict(self), "numbers": numbers}


def compare(
    recipes: Mapping[str, Sequence[str]],
    steps: Mapping[str, int],
    records: Sequence[Record],
    by: str | None,
) -> tuple[list[Row], str | None]:
    """Return a row for each recipe, in order, and the number by which they are judged.

    Args:
        recipes: overrides of each recipe.
        steps: steps of each recipe.
        records: records of all runs, finished or not.
        by: name of the number that decides; None for the first of the stage that all finished runs have.
    """
    finished = [each for each in records if each.state == "finished"]
    means = mean_error([each.numbers for each in finished])
    numbers = [{**each.numbers, **({LEVELS: mean} if mean else {})} for each, mean in zip(finished, means, strict=True)]
    if by is None and finished:
        shown = METRICS[finished[0].task.stage].numbers
        by = next((name for name in shown if all(name in each for each in numbers)), None)
    spreads: dict[str, dict[str, Spread]] = {name: {} for name in recipes}
    diverged: dict[str, set[int]] = {name: set() for name in recipes}
    for record in records:
        if record.state == "diverged":
            diverged[record.task.recipe].add(record.task.seed)
    for record, found in zip(finished, numbers, strict=True):
        if by in found and not math.isfinite(found[by].value):
            diverged[record.task.recipe].add(record.task.seed)
        for name, each in found.items():
            if math.isfinite(each.value):
                before = spreads[record.task.recipe].get(name)
                values = {**(before.values if before else {}), record.task.seed: each.value}
                spreads[record.task.recipe][name] = Spread(dict(sorted(values.items())), each.better, each.unit)
    rows = []
    for name, overrides in recipes.items():
        differences = {
            key: paired(each.values, spreads[PLAIN][key].values)
            for key, each in spreads[name].items()
            if name != PLAIN and key in spreads[PLAIN] and {*each.values} & {*spreads[PLAIN][key].values}
        }
        own = [each for each in records if each.task.recipe == name]
        done = sum(each.state == "finished" for each in own)
        rows.append(
            Row(
                name,
                overrides,
                steps[name],
                steps[name] / steps[PLAIN],
                spreads[name],
                differences,
                done,
                len(diverged[name]),
                sum(not each.is_done for each in own),
                _verdict(name, by, spreads[name], differences, len(diverged[name])),
            )
        )
    return rows, by


def _verdict(
    recipe: str, by: str | None, numbers: Mapping[str, Spread], differences: Mapping[str, Difference], diverged: int
) -> str:
    if diverged:
        return f"diverged ({diverged} run{'s' * (diverged > 1)})"
    if recipe == PLAIN:
        return ""
    found = differences.get(by) if by is not None else None
    if found is None:
        return "not measured"
    if found.low is None or found.high is None:
        return "one seed"
    if found.low <= 0 <= found.high:
        return "no difference seen"
    assert by is not None
    return "better" if (found.mean > 0) == (numbers[by].better == "higher") else "worse"


def paired(values: Mapping[int, float], plain: Mapping[int, float], level: float = LEVEL) -> Difference:
    """Return the mean difference of two numbers over the seeds that both have, with its interval.

    Args:
        values, plain: values by seed, of which at least one seed is in both.
        level: confidence level of the interval.
    """
    found = [values[seed] - plain[seed] for seed in sorted({*values} & {*plain})]
    mean, n = fmean(found), len(found)
    if n < 2:
        return Difference(mean, None, None, n)
    half = t_quantile((1 + level) / 2, n - 1) * stdev(found) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)
