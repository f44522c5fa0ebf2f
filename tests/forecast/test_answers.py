from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from ldm.errors import TrainingError
from ldm.forecast.answers import Forecast, make_forecast
from ldm.forecast.bands import Band
from ldm.forecast.curves import OFFSET_STEPS
from ldm.forecast.ladder import Result
from ldm.forecast.plan import FULL, SMALL, Extras, Rung, make_plan
from ldm.forecast.sentences import duration, sentences, table
from tests.forecast.ladders import IMAGES, SIZES, STEPS

FULL_RUN = Rung(FULL, IMAGES, STEPS)


def loss(parameters: float, images: float, steps: float, terms: Sequence[float]) -> float:
    """A law whose terms at the full run are ``terms``, with the exponents 0.4, 0.35 and 0.5, the floor 0.3 and the gain 0.2."""
    size, plateau = parameters / SIZES[FULL].parameters, OFFSET_STEPS / STEPS
    learned = (size**0.2 * steps / STEPS + plateau) / (1 + plateau)
    ratios = (size, images / IMAGES, learned)
    return 0.3 + sum(a * r**-e for a, r, e in zip(terms, ratios, (0.4, 0.35, 0.5), strict=True))


def results(terms: Sequence[float], recall: bool = False) -> list[Result]:
    generator, found = np.random.default_rng(0), []
    for rung in make_plan(FULL_RUN, SIZES, Extras(5, 192, 3000)).rungs:
        size = SIZES[rung.width]
        value = loss(size.parameters, rung.images, rung.steps, terms) * np.exp(0.003 * generator.standard_normal())
        share = 1 / (1 + np.exp(12 * np.log(value / 0.4)))
        hits = {"1": int(generator.binomial(200, share)), "5": int(generator.binomial(200, share**0.5))}
        measured = {**hits, "of": 200, "among": 3626} if recall else {}
        found.append(Result(rung, value, value, size.parameters, rung.steps * size.seconds, measured))
    return found


def forecast_of(terms: Sequence[float]) -> Forecast:
    return make_forecast(results(terms), FULL_RUN, SIZES)


@pytest.mark.parametrize(
    ("terms", "helps"),
    [((0.004, 0.08, 0.003), "images"), ((0.08, 0.004, 0.003), "model"), ((0.003, 0.003, 0.04), "steps")],
)
def test_what_helps_most_is_the_quantity_that_limits_the_loss(terms: Sequence[float], helps: str) -> None:
    forecast = forecast_of(terms)
    best = forecast.levers[0]
    assert best.quantity == helps
    assert best.best > 0.8
    factors = {"model": (2, 1, 1), "images": (1, 2, 1), "steps": (1, 1, 2)}[helps]
    for band, (n, d, s) in ((best.loss, factors), (forecast.expected, (1, 1, 1))):
        truth = loss(n * SIZES[FULL].parameters, d * IMAGES, s * STEPS, terms)
        assert band.median == pytest.approx(truth, rel=0.03)
        assert band.low < truth < band.high
    text = " ".join(sentences(forecast, "this machine"))
    name = {"images": "More images help most", "model": "A larger model helps most", "steps": "More steps help most"}[
        helps
    ]
    assert name in text
    assert "would lower the held-out loss from" in text
    assert "reach a held-out loss of" in text


def test_training_stops_paying_where_twice_the_steps_lower_the_loss_by_one_percent() -> None:
    terms = (0.01, 0.01, 0.02)
    forecast = forecast_of(terms)
    steps = np.geomspace(STEPS / 64, 64 * STEPS, 2000)
    now, twice = (
        np.array([loss(SIZES[FULL].parameters, IMAGES, factor * each, terms) for each in steps]) for factor in (1, 2)
    )
    truth = steps[np.argmax(1 - twice / now < 0.01)]
    assert forecast.pays_until is not None
    assert forecast.pays_until.low < truth < forecast.pays_until.high
    assert any("stops paying" in sentence for sentence in sentences(forecast, "this machine"))


def test_the_plateau_of_the_first_steps_is_not_where_training_stops_paying() -> None:
    """In a full run as short as the plateau, twice the first steps hardly help, but later ones do."""
    full = Rung(FULL, IMAGES, 2500)

    def value(steps: float) -> float:
        return float(0.02 + ((steps + 1500) / 4000) ** -0.6)

    runs = [Rung(FULL, IMAGES, steps) for steps in (40, 80, 160, 320, 640, 1000)]
    parameters = SIZES[FULL].parameters
    found = make_forecast(
        [Result(each, value(each.steps), value(each.steps), parameters, 1.0, {}) for each in runs], full, SIZES
    )
    assert value(2500) - value(5000) > 0.05 * value(2500)
    assert found.floor.median < found.full.loss.median
    assert found.floor.low < found.full.loss.low
    assert found.pays_until is not None
    assert found.pays_until.low > 2500
    assert "Further steps pay for all numbers looked at, up to 64 times the full run." in sentences(
        found, "this machine"
    )
    unsure = replace(found, pays_until=Band(8000.0, 3000.0, 64 * 2500.0))
    text = " ".join(sentences(unsure, "this machine"))
    assert "stops paying at about 8,000 steps" in text
    assert "(80 %: 3,000 to more than 160,000)" in text


def test_hours_are_those_of_the_measured_steps() -> None:
    forecast = forecast_of((0.01, 0.02, 0.02))
    assert forecast.full.hours == pytest.approx(STEPS * 0.35 / 3600)
    hours = {each.quantity: each.hours / forecast.full.hours for each in forecast.levers}
    assert hours["images"] == 1
    assert hours["steps"] == 2
    assert 1.5 < hours["model"] < 2.5  # the time of a step grows with parameters ** 0.9 between the sizes measured
    same = {each.parameters: each.steps for each in forecast.models}
    assert same[1.0] == STEPS
    assert same[4.0] < STEPS < same[0.25]


def test_recall_is_forecast_between_those_of_the_runs_and_one() -> None:
    found = results((0.01, 0.02, 0.02), recall=True)
    forecast = make_forecast(found, FULL_RUN, SIZES)
    assert set(forecast.full.recall) == {"1", "5"}
    best = max(each.recall["1"] / each.recall["of"] for each in found)
    assert best < forecast.full.recall["1"].median < 1
    assert any(sentence.startswith("R@1 of the full run") for sentence in sentences(forecast, "this machine"))
    lines = table(found)
    assert len({len(line) for line in lines}) == 1
    assert "R@5" in lines[0]


def test_a_ladder_of_small_models_alone_is_less_sure_about_the_full_one() -> None:
    found = results((0.03, 0.02, 0.02))
    small = [each for each in found if each.rung.width == SMALL]
    forecast, unsure = make_forecast(found, FULL_RUN, SIZES), make_forecast(small, FULL_RUN, SIZES)
    assert "model" in {each.quantity for each in unsure.levers}
    assert unsure.full.loss.high - unsure.full.loss.low > 1.5 * (forecast.full.loss.high - forecast.full.loss.low)
    assert not any("band is wide" in sentence for sentence in sentences(forecast, "this machine"))
    wide = replace(forecast, full=replace(forecast.full, loss=Band(0.4, 0.3, 0.5)))
    assert any("larger --budget" in sentence for sentence in sentences(wide, "this machine"))


def test_the_gain_is_that_of_the_law() -> None:
    found = results((0.02, 0.01, 0.05))
    gain = make_forecast(found, FULL_RUN, SIZES).gain
    assert gain is not None
    assert gain.low < 0.2 < gain.high < 3 * gain.low
    one_width = [each for each in found if each.rung.width == FULL]
    assert make_forecast([*one_width, *one_width], FULL_RUN, SIZES).gain is None


def test_too_few_runs_are_an_error() -> None:
    with pytest.raises(TrainingError, match="3 finished runs, but a forecast needs 4"):
        make_forecast(results((0.01, 0.02, 0.02))[:3], FULL_RUN, SIZES)


@pytest.mark.parametrize(("hours", "text"), [(8, "8.0 h"), (0.5, "30.0 min"), (0.001, "3.6 s")])
def test_durations_have_a_unit_that_suits_them(hours: float, text: str) -> None:
    assert duration(hours) == text
