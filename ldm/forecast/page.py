"""Page of a forecast: one HTML file with the sentences, charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ldm.forecast.answers import NAMES
from ldm.forecast.bands import Band
from ldm.forecast.ladder import Result
from ldm.forecast.learning_rate import highest_loss
from ldm.forecast.runner import Outcome
from ldm.forecast.sentences import duration, number
from ldm.report.charts import Chart, Line
from ldm.report.html import render_page


def page(outcome: Outcome) -> str:
    """Return the HTML of a forecast."""
    forecast = outcome.forecast
    levers = [
        (NAMES[each.quantity], _shown(each.loss), f"{100 * each.best:.0f} %", duration(each.hours))
        for each in forecast.levers
    ]
    laws = [(name, _shown(band)) for name, band in forecast.exponents.items()]
    if forecast.gain is not None:
        laws.append(("gain of a step by the model", _shown(forecast.gain)))
    laws.append(("floor", _shown(forecast.floor)))
    return render_page(
        f"{outcome.experiment.name}: forecast of the training",
        _TEMPLATE,
        name=outcome.experiment.name,
        folder=str(outcome.folder),
        sentences=outcome.sentences,
        charts=[each for each in (chart.html for chart in _charts(outcome)) if each],
        levers=levers,
        laws=laws,
        runs=[_row(each) for each in outcome.results],
        inflation=number(forecast.inflation),
        noise=f"{100 * forecast.noise:.2g} %",
        ladder=duration(outcome.seconds / 3600),
        limit=duration(outcome.plan.limit / 3600),
    )


def _shown(band: Band) -> str:
    return f"{number(band.median)} ({number(band.low)} to {number(band.high)})"


def _row(result: Result) -> Sequence[str]:
    rung = result.rung
    recall = "/".join(f"{100 * result.recall[k] / result.recall['of']:.0f}" for k in ("1", "5") if k in result.recall)
    cells = (f"{rung.width:g}", f"{result.parameters:,}", f"{rung.images:,}", f"{rung.steps:,}", str(rung.seed))
    return (*cells, f"{result.loss:.4f}", recall, duration(result.seconds / 3600))


def _bands(values: Sequence[tuple[float, Band]], marks: bool = False) -> list[Line]:
    """Return the limits and the median of forecasts as lines."""
    return [
        Line("upper limit", [(x, band.high) for x, band in values], 1),
        Line("median", [(x, band.median) for x, band in values], 0, marks=marks),
        Line("lower limit", [(x, band.low) for x, band in values], 1),
    ]


def _charts(outcome: Outcome) -> list[Chart]:
    forecast, test = outcome.forecast, outcome.measured.test
    runs = sorted(
        outcome.results, key=lambda each: (each.rung.width, each.rung.images, each.rung.seed, each.rung.steps)
    )
    groups = groupby(runs, key=lambda each: (each.rung.width, each.rung.images, each.rung.seed))
    ladder = [
        Line(
            f"width {width:g}, {images:,} images" + (f", seed + {seed}" if seed else ""),
            [(each.rung.steps, each.loss) for each in group],
            2 + i,
            marks=True,
        )
        for i, ((width, images, seed), group) in enumerate(groups)
    ]
    charts = [
        Chart(
            "Held-out loss",
            [*_bands([(each.steps, each.loss) for each in forecast.curve]), *ladder],
            y_label="loss",
            log_x=True,
            log_y=True,
            note="The forecast of the full model on all images, by its steps, and the runs of the ladder.",
        )
    ]
    charts += [
        Chart(
            f"R@{k}",
            _bands([(each.steps, each.recall[k]) for each in forecast.curve]),
            y_label=f"R@{k}",
            log_x=True,
            log_y=False,
            y_range=(0, 1),
        )
        for k in forecast.full.recall
    ]
    if forecast.models:
        values = [(outcome.measured.sizes[1.0].parameters * each.parameters, each.loss) for each in forecast.models]
        charts.append(
            Chart(
                "Models of other sizes in the time of the full run",
                _bands(values, marks=True),
                y_label="loss",
                x_label="parameters",
                log_x=True,
                log_y=False,
            )
        )
    highest = highest_loss(test.losses)
    shown = [(rate, loss) for rate, loss in zip(test.rates, test.losses, strict=True) if loss < highest]
    charts.append(
        Chart(
            "Learning-rate range test",
            [Line("smoothed loss", shown, 0)],
            y_label="loss",
            x_label="learning rate",
            log_x=True,
            log_y=False,
            note=f"Lowest at {number(test.limit)}; suggested: {number(test.suggested)}."
            if test.diverged
            else "The loss did not rise.",
        )
    )
    return charts


_TEMPLATE: Any = """
<header><h1>{{ name }}: forecast</h1><p><code>{{ folder }}</code></p></header>
<main>
<section><h2>Answers</h2><ul>{% for each in sentences %}<li>{{ each }}</li>{% endfor %}</ul></section>
<section><h2>Curves</h2><div class="charts">{% for each in charts %}{{ each }}{% endfor %}</div></section>
<section><h2>Twice as much</h2><table><tr><th>of</th><th>loss (80 % band)</th><th>helps most</th><th>time</th></tr>
{% for row in levers %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></section>
<section><h2>Runs of the ladder</h2><table><tr><th>width</th><th>parameters</th><th>images</th><th>steps</th><th>seed</th>
<th>loss</th><th>R@1/R@5 in %</th><th>time</th></tr>
{% for row in runs %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<p>The ladder took {{ ladder }} of at most {{ limit }}.</p></section>
<section><h2>Fitted laws</h2><table><tr><th>parameter</th><th>80 % band</th></tr>
{% for row in laws %}<tr><td>{{ row[0] }}</td><td>{{ row[1] }}</td></tr>{% endfor %}</table>
<p>The loss of a run varies by {{ noise }} with its seed. The longest run of each width, forecast from the others, widens the
bands by a factor of {{ inflation }}.</p></section>
</main>
"""
