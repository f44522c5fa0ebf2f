"""Values of named rows as dots on a horizontal axis, as SVG; colours and fonts are those of ``style.css``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ldm.report.charts import BOTTOM, RIGHT, TOP, WIDTH, Axis, number
from ldm.report.html import render

LABELS = 165
"""Width of the labels of the rows."""

ROW = 18
"""Height of a row."""


@dataclass(frozen=True)
class DotRow:
    """A row: its label, its values, and their mean."""

    label: str
    values: Sequence[float]
    mean: float


@dataclass(frozen=True)
class DotPlot:
    """Rows of dots, with a line at a reference value.

    Args:
        title: heading.
        rows: the rows, from the top; those without values are left out.
        label: label of the axis.
        reference: value that the rows are compared with.
        note: a sentence below the heading.
    """

    title: str
    rows: Sequence[DotRow]
    label: str
    reference: float | None = None
    note: str = ""

    @property
    def html(self) -> Markup:
        """The plot with its heading; empty if there are no values."""
        rows = [row for row in self.rows if row.values]
        if not rows:
            return Markup()
        values = [value for row in rows for value in row.values]
        values += [] if self.reference is None else [self.reference]
        margin = (max(values) - min(values)) / 20
        x = Axis.of([min(values) - margin, max(values) + margin], False, LABELS, WIDTH - RIGHT)
        height = TOP + ROW * len(rows) + BOTTOM
        return render(
            _DOT_PLOT, plot=self, rows=rows, x=x, width=WIDTH, height=height, left=LABELS, top=TOP, bottom=height - BOTTOM,
            right=WIDTH - RIGHT, row_height=ROW, number=number,
        )  # fmt: skip


_DOT_PLOT = """
<figure class="chart">
<figcaption><h4>{{ plot.title }}</h4>{% if plot.note %}<p>{{ plot.note }}</p>{% endif %}</figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ plot.title }}: {% for row in rows -%}
{{ row.label }} {{ number(row.mean) }}{{ "; " if not loop.last }}{% endfor %}">
<g class="grid">{% for tick, text in x.labels %}
<line x1="{{ x.at(tick) }}" x2="{{ x.at(tick) }}" y1="{{ top }}" y2="{{ bottom }}"/>
<text class="x" x="{{ x.at(tick) }}" y="{{ bottom + 16 }}">{{ text }}</text>{% endfor %}
<text class="label" x="{{ right }}" y="{{ bottom + 32 }}">{{ plot.label }}</text></g>
{% if plot.reference is not none %}<g class="line c1"><polyline points="{{ x.at(plot.reference) }},{{ top }} {# -#}
{{ x.at(plot.reference) }},{{ bottom }}"/></g>{% endif %}
{% for row in rows %}{% set y = top + row_height * (loop.index0 + 0.5) %}
<text class="y" x="{{ left - 7 }}" y="{{ y + 3.5 }}">{{ row.label }}</text>
<g class="line c0"><title>{{ row.label }}: mean {{ number(row.mean) }}</title>
{% for value in row.values %}<circle cx="{{ x.at(value) }}" cy="{{ y }}" r="2.6"/>{% endfor %}
<polyline points="{{ x.at(row.mean) }},{{ y - 6 }} {{ x.at(row.mean) }},{{ y + 6 }}"/></g>{% endfor %}</svg>
</figure>
"""
