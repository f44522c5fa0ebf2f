from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ldm.errors import ConfigError
from ldm.forecast.plan import FULL, LONG, MIDDLE, SHARE, SMALL, Extras, Rung, make_plan, seconds_of
from tests.forecast.ladders import EXTRAS, SIZES


@pytest.mark.parametrize("steps", [8_000, 20_000, 80_000, 1_000_000])
@pytest.mark.parametrize("share", [0.05, SHARE])
def test_the_ladder_keeps_its_part_of_the_full_run_and_uses_most_of_it(steps: int, share: float) -> None:
    plan = make_plan(Rung(FULL, 3434, steps), SIZES, EXTRAS, share=share)
    assert plan.full_seconds == steps * 0.35
    assert list(plan.seconds) == [seconds_of(rung, SIZES, EXTRAS) for rung in plan.rungs]
    assert 0.7 * plan.limit < sum(plan.seconds) <= plan.limit == pytest.approx(share * plan.full_seconds)
    assert len({*plan.rungs}) == len(plan.rungs) >= 5
    assert all(rung.steps % 4 == 0 and rung.steps < steps for rung in plan.rungs)


def test_a_long_ladder_varies_each_quantity_and_repeats_runs_with_another_seed() -> None:
    rungs = make_plan(Rung(FULL, 3434, 80_000), SIZES, EXTRAS).rungs
    assert len(rungs) == 12
    assert {rung.width for rung in rungs} == {SMALL, MIDDLE, FULL}
    assert len({rung.images for rung in rungs}) == 3
    for width in (SMALL, MIDDLE, FULL):
        assert len({rung.steps for rung in rungs if rung.width == width}) >= 2
    assert sum(replace(rung, seed=0) in rungs for rung in rungs if rung.seed) == 2


def test_a_shorter_full_run_has_fewer_runs_that_still_vary_each_quantity() -> None:
    counts = [len(make_plan(Rung(FULL, 3434, steps), SIZES, EXTRAS).rungs) for steps in (2_500, 5_000, 80_000)]
    assert counts == sorted(counts)
    assert counts[0] < 12
    rungs = make_plan(Rung(FULL, 3434, 2_500), SIZES, EXTRAS).rungs[:4]  # the most important ones
    for name in ("width", "images", "steps"):
        assert len({getattr(rung, name) for rung in rungs}) >= 2


def test_a_ladder_has_long_runs_rather_than_many() -> None:
    for steps in (2_500, 5_000, 10_000, 20_000, 80_000):
        rungs = make_plan(Rung(FULL, 3434, steps), SIZES, EXTRAS).rungs
        assert len(rungs) == 5 or max(rung.steps for rung in rungs) >= LONG


def test_without_other_widths_or_parts_of_the_data_the_ladder_varies_the_rest() -> None:
    full = Rung(FULL, 3434, 80_000)
    one_width = make_plan(full, {FULL: SIZES[FULL]}, EXTRAS).rungs
    assert {rung.width for rung in one_width} == {FULL}
    assert len({rung.images for rung in one_width}) == 3
    one_set = make_plan(full, SIZES, EXTRAS, subsets=False).rungs
    assert {rung.images for rung in one_set} == {3434}
    assert len({rung.steps for rung in one_set if rung.width == SMALL}) == 3


def test_a_full_run_that_is_too_short_says_how_long_it_has_to_be() -> None:
    with pytest.raises(ConfigError, match=r"give a --budget of at least \d+ s") as error:
        make_plan(Rung(FULL, 3434, 100), SIZES, EXTRAS)
    seconds = int(str(error.value).split("at least ")[1].split(" s")[0])
    assert make_plan(Rung(FULL, 3434, round(1.02 * seconds / 0.35)), SIZES, EXTRAS).rungs
    with pytest.raises(ConfigError, match="shortest ladder"):
        make_plan(Rung(FULL, 3434, round(0.95 * seconds / 0.35)), SIZES, EXTRAS)


def test_a_full_run_of_the_least_length_has_a_ladder_without_recall() -> None:
    extras = replace(EXTRAS, evaluations=200_000)
    with pytest.raises(ConfigError) as error:
        make_plan(Rung(FULL, 3434, 100), SIZES, extras)
    steps = int(str(error.value).rpartition("at least ")[2].split(" ")[0]) / SIZES[FULL].seconds
    full = Rung(FULL, 3434, math.ceil(steps))
    plan = make_plan(full, SIZES, extras)
    assert plan == make_plan(full, SIZES, replace(EXTRAS, evaluations=0))
    assert plan.evaluations == 0
    longer = make_plan(replace(full, steps=100 * full.steps), SIZES, extras)
    assert longer.evaluations == extras.evaluations


def test_a_narrow_network_that_is_no_faster_has_no_more_steps() -> None:
    sizes = {
        width: replace(size, seconds=seconds)
        for (width, size), seconds in zip(SIZES.items(), (0.4, 0.3, 0.35), strict=True)
    }
    rungs = make_plan(Rung(FULL, 3434, 20_000), sizes, EXTRAS).rungs
    longest = {width: max(rung.steps for rung in rungs if rung.width == width) for width in sizes}
    assert longest[FULL] == longest[SMALL] == longest[MIDDLE]


def test_the_next_wider_network_stands_for_a_missing_one() -> None:
    sizes = {width: SIZES[width] for width in (MIDDLE, FULL)}
    rungs = make_plan(Rung(FULL, 3434, 20_000), sizes, EXTRAS).rungs
    assert {rung.width for rung in rungs} == {MIDDLE, FULL}
    assert len({*rungs}) == len(rungs) >= 5
    bare = make_plan(Rung(FULL, 3434, 80_000), {FULL: SIZES[FULL]}, EXTRAS, subsets=False).rungs
    assert len({*bare}) == 5


def test_no_run_has_more_steps_than_the_full_one() -> None:
    sizes = {SMALL: replace(SIZES[SMALL], seconds=0.01), FULL: replace(SIZES[FULL], seconds=1.0)}
    plan = make_plan(Rung(FULL, 3434, 103), sizes, Extras(0, 0))
    assert max(rung.steps for rung in plan.rungs) == 100
