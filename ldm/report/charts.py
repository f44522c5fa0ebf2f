"""Charts as SVG, which show their content without JavaScript; a script adds the values under the pointer.

Colours and fonts are those of ``style.css``, by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from ldm.report.html import render

WIDTH, HEIGHT = 430, 210
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 8, 36
POINTS = 400
"""Largest number of points of a line; of more, each point is the mean of some."""

LOG_RATIO = 30.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

SMOOTHED = 30
"""Number of points from which a line is smoothed, with its points behind it."""

XY = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        label: its name in the legend.
        points: x and y, with increasing x.
        color: number of its colour.
        smooth: True to smooth it if it has many points.
        marks: True to draw its points.
        sequential: strength of the colour in [0, 1], in place of ``color``, for lines that have an order.
    """

    label: str
    points: Sequence[XY]
    color: int = 0
    smooth: bool = False
    marks: bool = False
    sequential: float | None = None


@dataclass(frozen=True)
class Chart:
    """A chart of lines over a common x axis.

    Args:
        title: heading.
        lines: its lines; those without points are left out.
        y_label, x_label: labels of the axes, with units.
        log_y: True, False, or None to decide by the range of the values.
        log_x: True for a logarithmic x axis.
        note: a sentence below the heading.
        y_range: least range of a linear y axis.
        last_values: True to give the last value of each line in the legend.
    """

    title: str
    lines: Sequence[Line]
    y_label: str = ""
    x_label: str = "step"
    log_y: bool | None = None
    log_x: bool = False
    note: str = ""
    y_range: XY | None = None
    last_values: bool = True

    @property
    def html(self) -> Markup:
        """The chart with its heading and legend; empty if there are no points."""
        lines = [line for line in self.lines if line.points]
        if not lines:
            return Markup()
        drawn = [_Drawn(line) for line in lines]
        x = Axis.of([p[0] for each in drawn for p in each.points], self.log_x, LEFT, WIDTH - RIGHT)
        values = [p[1] for each in drawn for p in each.points]
        log_y = _spans_orders(values) if self.log_y is None else self.log_y and min(values) > 0
        y = Axis.of([*values, *(() if log_y else self.y_range or ())], log_y, HEIGHT - BOTTOM, TOP)
        data = {
            "x": [x.low, x.high, x.log],
            "y": [y.low, y.high, y.log],
            "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
            "label": self.x_label,
            "lines": [
                {"label": each.line.label, "points": [[_short(v) for v in p] for p in each.shown]} for each in drawn
            ],
        }
        return render(
            _CHART, chart=self, drawn=drawn, x=x, y=y, width=WIDTH, height=HEIGHT, left=LEFT, bottom=HEIGHT - BOTTOM,
            right=WIDTH - RIGHT, top=TOP, data=data, number=number,
        )  # fmt: skip


class _Drawn:
    """A line with the points that are drawn of it: as they are, and smoothed if it has many."""

    def __init__(self, line: Line):
        self.line = line
        self.points = thinned(line.points)
        self.smooth = smoothed(self.points) if line.smooth and len(self.points) >= SMOOTHED else []
        self.shown = self.smooth or self.points

    @property
    def color(self) -> str:
        """Class of its colour in ``style.css``."""
        if self.line.sequential is None:
            return f"c{self.line.color % 6}"
        return f"q{max(1, round(5 * self.line.sequential))}"

    @property
    def last(self) -> float:
        return self.line.points[-1][1]


@dataclass
class Axis:
    """Map from values to coordinates, with its ticks.

    Args:
        low, high: range of the values.
        log: True if it is logarithmic.
        start, end: coordinates of low and high.
    """

    low: float
    high: float
    log: bool
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, values: Sequence[float], log: bool, start: float, end: float) -> Axis:
        """Make an axis that contains the values, and ends at ticks if it is vertical."""
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))
        count = 5 if start < end else 4
        axis = cls(low, high, log, start, end)
        axis.ticks = log_ticks(low, high, count) if log else linear_ticks(low, high, count)
        if start > end and not log:  # vertical
            step = axis.ticks[1] - axis.ticks[0]
            axis.low, axis.high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
            axis.ticks = linear_ticks(axis.low, axis.high, count)
        return axis

    @property
    def labels(self) -> list[tuple[float, str]]:
        """Ticks with their texts, which have more than three digits if these do not tell them apart."""
        texts = [number(tick) for tick in self.ticks]
        if len({*texts}) < len(texts):
            texts = [f"{tick:.10g}" for tick in self.ticks]
        return list(zip(self.ticks, texts, strict=True))

    def at(self, value: float) -> float:
        """Return the coordinate of a value."""
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Return two or more multiples of 1, 2 or 5 times a power of 10 in a range, about ``count``."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks if len(ticks) > 1 else [low, high]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Return powers of 10 in a range, with 2 and 5 times them if there are few, or every second or so if there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [p for p in range(first, last + 1) if low * 0.999 <= 10.0**p <= high * 1.001]
    if len(powers) >= 3:
        return [10.0**p for p in powers[:: math.ceil(len(powers) / (count + 1))]]
    ticks = [factor * 10.0**p for p in range(first, last + 1) for factor in (1, 2, 5)]
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside if len(inside) > 1 else [low, high]


def _spans_orders(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > LOG_RATIO


def thinned(points: Sequence[XY], limit: int = POINTS) -> list[XY]:
    """Return at most ``limit`` points, each the mean of as many neighbours; the x is that of the last of them."""
    size = math.ceil(len(points) / limit)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(points: Sequence[XY]) -> list[XY]:
    """Return an exponential moving average of y over a thirtieth of the points, without the bias of its beginning."""
    decay, average, weight, out = 1 - min(1.0, 30 / len(points)), 0.0, 0.0, []
    for x, y in points:
        average, weight = decay * average + (1 - decay) * y, decay * weight + (1 - decay)
        out.append((x, average / weight))
    return out


def number(value: float) -> str:
    """Return a number for a reader, with three significant digits; thousands and millions as k and M.

    >>> [number(each) for each in (0.00012, 0.5, 12.34, 1500, 2_000_000)]
    ['1.2e-4', '0.5', '12.3', '1.5k', '2M']
    """
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}" if size < 1e12 else f"{value:.2g}"
    return f"{value:.3g}"


def _short(value: float) -> float:
    return float(f"{value:.5g}") if value != int(value) else int(value)


RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
"""Viridis (van der Walt and Smith, CC0), of which the lightness increases evenly."""


def sequential_color(share: float) -> str:
    """Return the colour at ``share`` in [0, 1] of the scale from dark to light."""
    position = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    index = min(int(position), len(RAMP) - 2)
    low, high = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in RAMP[index : index + 2])
    mixed = (round(a + (b - a) * (position - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


@dataclass(frozen=True)
class HeatMap:
    """Values over steps and named rows, as colours.

    Args:
        title: heading.
        steps: x of each column.
        rows: label and values of each row, from the bottom; None where there is no value.
        unit: what the colour shows; its scale is logarithmic.
    """

    title: str
    steps: Sequence[int]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    unit: str

    @property
    def html(self) -> Markup:
        """The map with its heading and the scale of its colours; empty if there are no values."""
        values = [value for _, row in self.rows for value in row if value is not None and value > 0]
        if not values:
            return Markup()
        scale = Axis.of([min(values), max(values)], True, 0, 1)
        wide, high = (WIDTH - LEFT - RIGHT) / len(self.steps), (HEIGHT - TOP - BOTTOM) / len(self.rows)
        cells = [
            {
                "x": round(LEFT + column * wide, 1),
                "y": round(HEIGHT - BOTTOM - (row + 1) * high, 1),
                "color": sequential_color((math.log(value) - math.log(scale.low)) / math.log(scale.high / scale.low)),
                "title": f"step {step:,}, sigma {label}: {number(value)}",
            }
            for row, (label, row_values) in enumerate(self.rows)
            for column, (step, value) in enumerate(zip(self.steps, row_values, strict=True))
            if value is not None and value > 0
        ]
        labels = [(label, round(HEIGHT - BOTTOM - (row + 0.5) * high, 1)) for row, (label, _) in enumerate(self.rows)]
        every = math.ceil(len(self.steps) / 6)
        ticks = [(step, round(LEFT + (i + 0.5) * wide, 1)) for i, step in enumerate(self.steps) if i % every == 0]
        context: dict[str, Any] = {"cells": cells, "labels": labels, "ticks": ticks, "ramp": RAMP, "scale": scale}
        return render(
            _HEAT_MAP, chart=self, width=WIDTH, height=HEIGHT, left=LEFT, bottom=HEIGHT - BOTTOM, right=WIDTH - RIGHT, top=TOP,
            wide=round(wide + 0.3, 1), high=round(high + 0.3, 1), number=number, **context,
        )  # fmt: skip


_CHART = """
<figure class="chart">
<figcaption><h4>{{ chart.title }}</h4>{% if chart.note %}<p>{{ chart.note }}</p>{% endif %}
<ul class="legend">{% for each in drawn %}<li class="{{ each.color }}"><i></i>{{ each.line.label }}
{% if chart.last_values %}<b>{{ number(each.last) }}</b>{% endif %}</li>{% endfor %}</ul></figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ chart.title }}: {% for each in drawn -%}
{{ each.line.label }} ends at {{ number(each.last) }}{{ "; " if not loop.last }}{% endfor %}">
<g class="grid">{% for tick, text in y.labels %}
<line x1="{{ left }}" x2="{{ right }}" y1="{{ y.at(tick) }}" y2="{{ y.at(tick) }}"/>
<text class="y" x="{{ left - 7 }}" y="{{ y.at(tick) + 3.5 }}">{{ text }}</text>{% endfor %}
{% for tick, text in x.labels %}<text class="x" x="{{ x.at(tick) }}" y="{{ bottom + 16 }}">{{ text }}</text>{% endfor %}
<text class="label" x="{{ right }}" y="{{ bottom + 32 }}">{{ chart.x_label }}</text>
<text class="label side" transform="translate(10 {{ (top + bottom) / 2 }}) rotate(-90)">{{ chart.y_label }}
{%- if y.log %} (log){% endif %}</text></g>
{% for each in drawn %}<g class="line {{ each.color }}">
{% if each.smooth %}<polyline class="raw" points="{% for p in each.points %}{{ x.at(p[0]) }},{{ y.at(p[1]) }} {% endfor %}"/>
{% endif %}<polyline points="{% for p in each.shown %}{{ x.at(p[0]) }},{{ y.at(p[1]) }} {% endfor %}"/>
{% if each.line.marks or each.shown | length == 1 %}{% for p in each.shown %}<circle cx="{{ x.at(p[0]) }}" cy="{{ y.at(p[1]) }}"
 r="2.6"/>{% endfor %}{% endif %}</g>{% endfor %}
<g class="pointer"></g></svg>
<script type="application/json">{{ data | tojson }}</script>
</figure>
"""

_HEAT_MAP = """
<figure class="chart">
<figcaption><h4>{{ chart.title }}</h4><ul class="legend scale"><li>{{ number(scale.low) }}
<svg viewBox="0 0 {{ ramp | length }} 1" preserveAspectRatio="none" aria-hidden="true">{% for color in ramp %}
<rect x="{{ loop.index0 }}" width="1.1" height="1" fill="{{ color }}"/>{% endfor %}</svg>
{{ number(scale.high) }} {{ chart.unit }} (log)</li></ul></figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ chart.title }}">
<g>{% for cell in cells %}<rect x="{{ cell.x }}" y="{{ cell.y }}" width="{{ wide }}" height="{{ high }}" fill="{{ cell.color }}">
<title>{{ cell.title }}</title></rect>{% endfor %}</g>
<g class="grid">{% for label, at in labels %}<text class="y" x="{{ left - 7 }}" y="{{ at + 3.5 }}">{{ label }}</text>{% endfor %}
{% for step, at in ticks %}<text class="x" x="{{ at }}" y="{{ bottom + 16 }}">{{ number(step) }}</text>{% endfor %}
<text class="label" x="{{ right }}" y="{{ bottom + 32 }}">step</text></g></svg>
</figure>
"""
