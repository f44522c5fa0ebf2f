"""The forecast in sentences and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ldm.forecast.answers import FARTHEST, NAMES, WORTHWHILE, Forecast, Lever
from ldm.forecast.bands import Band
from ldm.forecast.ladder import Result

TWICE = {"model": "a model of twice the parameters", "images": "twice the images", "steps": "twice the steps"}

WIDE = 1.5
"""Ratio of the limits of a band from which it is called wide."""

CLEAR, LIKELY = 0.8, 0.5
"""Probabilities from which one quantity helps most, and from which it probably does."""


def number(value: float) -> str:
    """Return a number with three digits, and thousands with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(hours: float) -> str:
    """Return a time in the unit that suits it."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def _band(band: Band) -> str:
    return f"{number(band.median)} (80 %: {number(band.low)} to {number(band.high)})"


def sentences(forecast: Forecast, device: str, worthwhile: float = WORTHWHILE) -> Iterator[str]:
    """Yield the answers, one sentence or two each."""
    full = forecast.full
    yield (
        f"{full.steps:,} steps of the full run take {duration(full.hours)} on {device} and reach a held-out loss of "
        f"{_band(full.loss)}."
    )
    if full.loss.high > WIDE * full.loss.low:
        yield "That band is wide. Longer runs usually narrow it; a larger --budget has longer ones."
    for k, band in full.recall.items():
        yield f"R@{k} of the full run: {_percent(band)}."
    if forecast.levers:
        yield _most_helpful(forecast)
    for lever in forecast.levers[1:]:
        yield f"{TWICE[lever.quantity].capitalize()}: {_band(lever.loss)} in {duration(lever.hours)}."
    if forecast.pays_until is not None:
        yield _paying(forecast, worthwhile)
    if forecast.models:
        best = min(forecast.models, key=lambda each: each.loss.median)
        if best.parameters == 1:
            yield "In the same time, no model of another size is expected to reach a lower loss."
        else:
            sizes = [each.parameters for each in forecast.models]
            limit = {max(sizes): "at least ", min(sizes): "at most "}.get(best.parameters, "")
            times = f"{limit}{best.parameters:g} times"
            yield (
                f"In the same time, a model of {times} the parameters, trained for {best.steps:,} steps, would reach "
                f"{_band(best.loss)} instead of {_band(forecast.expected)}."
            )


def _percent(band: Band) -> str:
    return f"{100 * band.median:.0f} % (80 %: {100 * band.low:.0f} to {100 * band.high:.0f} %)"


def _most_helpful(forecast: Forecast) -> str:
    best: Lever = forecast.levers[0]
    name = NAMES[best.quantity]
    verb = "help" if best.quantity != "model" else "helps"
    if len(forecast.levers) == 1:
        head = f"{name} would help"
    elif best.best >= CLEAR:
        head = f"{name} {verb} most"
    elif best.best >= LIKELY:
        head = f"{name} probably {verb} most ({100 * best.best:.0f} %)"
    else:
        others = ", ".join(f"{NAMES[each.quantity]} {100 * each.best:.0f} %" for each in forecast.levers)
        head = f"it is not clear what helps most ({others})"
    change = f"{TWICE[best.quantity]} would lower the held-out loss from {number(forecast.expected.median)} to {_band(best.loss)}"
    return f"{head[0].upper()}{head[1:]}: {change}, in {duration(best.hours)}."


def _paying(forecast: Forecast, worthwhile: float) -> str:
    band, steps = forecast.pays_until, forecast.full.steps
    assert band is not None
    per_step = forecast.full.hours / steps
    percent = f"{100 * worthwhile:g} %"
    if band.low >= 0.9 * FARTHEST * steps:
        return f"Further steps pay for all numbers looked at, up to {FARTHEST:g} times the full run."
    if band.high <= 1.1 * steps / FARTHEST:
        return (
            f"Training stops paying before {_rounded(steps / FARTHEST)} steps: from there on, twice the steps lower the loss by "
            f"less than {percent}."
        )
    farthest, end = f"more than {_rounded(FARTHEST * steps)}", 0.99 * FARTHEST * steps
    when = (
        f"about {_rounded(band.median)} steps, {duration(band.median * per_step)}"
        if band.median < end
        else f"{farthest} steps"
    )
    high = _rounded(band.high) if band.high < end else farthest
    return (
        f"Training stops paying at {when} (80 %: {_rounded(band.low)} to {high}): from there on, twice the steps lower the loss "
        f"by less than {percent}."
    )


def _rounded(value: float) -> str:
    """Return a number of steps with two digits."""
    return f"{float(f'{value:.1e}'):,.0f}"


def table(results: Sequence[Result]) -> list[str]:
    """Return the runs of the ladder as the lines of a table."""
    ks = [k for k in ("1", "5") if any(k in each.recall for each in results)]
    lines = [
        f"{'width':>6} {'parameters':>12} {'images':>9} {'steps':>9} {'seed':>5} {'loss':>8}"
        + "".join(f" {'R@' + k:>6}" for k in ks)
        + f" {'time':>9}"
    ]
    for each in sorted(results, key=lambda each: (each.rung.width, each.rung.images, each.rung.steps, each.rung.seed)):
        rung, time = each.rung, duration(each.seconds / 3600)
        shares = "".join(
            f" {100 * each.recall[k] / each.recall['of']:>5.1f}%" if k in each.recall else f" {'':>6}" for k in ks
        )
        left = f"{rung.width:>6g} {each.parameters:>12,} {rung.images:>9,} {rung.steps:>9,} {rung.seed:>5}"
        lines.append(f"{left} {each.loss:>8.4f}{shares} {time:>9}")
    return lines
