from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ldm.ablation.comparison import compare, paired
from ldm.ablation.metrics import Measured
from ldm.ablation.runs import Record, Task

BY = "recall_by_image@1"


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_interval_of_a_difference_is_that_of_the_paired_t_test(n: int) -> None:
    plain, values = np.random.default_rng(n).normal(size=(2, n))
    expected = stats.ttest_rel(values, plain).confidence_interval(0.95)
    found = paired(dict(enumerate(values)), dict(enumerate(plain)))
    assert found.mean == pytest.approx((values - plain).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_differences_are_of_the_seeds_that_both_have() -> None:
    found = paired({0: 1.0, 1: 3.0, 2: 9.0}, {1: 1.0, 2: 5.0, 3: 100.0})
    assert (found.mean, found.seeds) == (3, 2)
    assert paired({0: 2.0}, {0: 1.5, 1: 7.0}).low is None


def record(recipe: str, seed: int, recall: float | None, **numbers: float) -> Record:
    task = Task(recipe, seed, "denoiser", 10, 1, ())
    if recall is None:
        return Record(task, "diverged", error="the loss is nan")
    found = {BY: Measured(recall, "higher")} | {
        name.replace("__", "@"): Measured(value, "lower") for name, value in numbers.items()
    }
    return Record(task, "finished", numbers=found)


def verdicts(*records: Record, by: str | None = BY) -> dict[str, str]:
    names = {each.task.recipe: () for each in records}
    return {row.recipe: row.verdict for row in compare(names, dict.fromkeys(names, 10), records, by)[0]}


def test_verdicts_follow_from_the_interval_and_the_direction() -> None:
    plain = [record("plain", seed, 0.5 + 0.1 * seed, fid=1.0) for seed in range(3)]
    better = [record("better", seed, 0.7 + 0.11 * seed, fid=0.5) for seed in range(3)]
    worse = [record("worse", seed, 0.3 + 0.09 * seed, fid=1.5) for seed in range(3)]
    same = [record("same", seed, 0.5 + 0.1 * seed + (-0.05, 0.05, 0.01)[seed], fid=1.0) for seed in range(3)]
    single = [record("single", 0, 0.9, fid=0.1)]
    found = verdicts(*plain, *better, *worse, *same, *single)
    assert found == {
        "plain": "",
        "better": "better",
        "worse": "worse",
        "same": "no difference seen",
        "single": "one seed",
    }
    by_fid = verdicts(*plain, *better, *worse, by="fid")
    assert (by_fid["better"], by_fid["worse"]) == ("better", "worse")


def test_diverged_runs_are_shown() -> None:
    runs = [record("plain", 0, 0.5), record("plain", 1, 0.6), record("muon", 0, None), record("muon", 1, 0.9)]
    rows, _ = compare({"plain": (), "muon": ()}, {"plain": 10, "muon": 10}, runs, BY)
    assert (rows[1].finished, rows[1].diverged, rows[1].verdict) == (1, 1, "diverged (1 run)")
    assert rows[1].numbers[BY].values == {1: 0.9}
    assert verdicts(record("plain", 0, 0.5), record("nan", 0, math.nan))["nan"] == "diverged (1 run)"
    found = verdicts(record("plain", 0, 0.5), record("muon", 0, 0.6), by="fid")  # without a feature network
    assert found == {"plain": "", "muon": "not measured"}


def test_the_held_out_error_is_of_the_levels_that_all_runs_have() -> None:
    runs = [
        record("plain", 0, 0.5, denoising_error__1=0.5, denoising_error__2=0.8),
        record("flow", 0, 0.5, denoising_error__1=0.4, denoising_error__2=0.9, denoising_error__50=9.0),
    ]
    rows, _ = compare({"plain": (), "flow": ()}, {"plain": 10, "flow": 5}, runs, None)
    assert rows[0].numbers["denoising_error"].mean == pytest.approx(math.sqrt(0.4))
    assert rows[1].numbers["denoising_error"].mean == pytest.approx(math.sqrt(0.36))
    assert rows[1].ratio == 0.5
