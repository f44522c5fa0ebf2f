"""Denoising loss by noise level."""

from __future__ import annotations

import math
import re

from markupsafe import Markup

from ldm.report.charts import Chart, HeatMap, Line, number
from ldm.report.html import render
from ldm.report.run import Points, Stage

MOMENTS = 5
"""Number of steps for which the loss is drawn over the noise level."""

COLUMNS = 60
"""Largest number of columns of a map."""

SPLITS = {"train": "training", "val": "validation"}


def part(stage: Stage) -> Markup:
    """Return, for training and validation, the loss over the noise level at some steps, and a map over all steps."""
    charts = []
    for prefix, split in SPLITS.items():
        levels = _levels(stage, prefix)
        steps = sorted({step for _, _, points in levels for step, _ in points})
        if len(levels) < 2:
            continue
        values = {(low, step): value for low, _, points in levels for step, value in points}
        moments = _moments(steps)
        lines = [
            Line(
                f"step {step:,}",
                [(_center(low, high), values[low, step]) for low, high, _ in levels if (low, step) in values],
                marks=True,
                sequential=(i + 1) / len(moments),
            )
            for i, step in enumerate(moments)
        ]
        title = f"Loss over the noise level, {split}"
        charts.append(Chart(title, lines, "loss", "sigma (log)", log_x=True, last_values=False).html)
        columns = steps[:: math.ceil(len(steps) / COLUMNS)]
        rows = [(f"≥ {number(low)}", [values.get((low, step)) for step in columns]) for low, _, _ in levels]
        charts.append(HeatMap(f"Loss by noise level (sigma) and step, {split}", columns, rows, "loss").html)
    return render(_TEMPLATE, charts=charts) if charts else Markup()


def _levels(stage: Stage, prefix: str) -> list[tuple[float, float, Points]]:
    """Return limits and values of each range of noise levels, in increasing order."""
    found = []
    for name, points in stage.metrics.items():
        if match := re.fullmatch(rf"{prefix}/loss_sigma_([\d.e+-]+)_([\d.e+-]+|inf)", name):
            found.append((float(match[1]), float(match[2]), points))
    return sorted(found, key=lambda level: level[0])


def _center(low: float, high: float) -> float:
    """Return the geometric centre of a range; an open one is taken as wide as the others."""
    width = math.sqrt(10)
    low, high = low or high / width, high if math.isfinite(high) else low * width
    return math.sqrt(low * high)


def _moments(steps: list[int]) -> list[int]:
    """Return some of the steps, more of the early ones, with the first and the last."""
    indices = {round((len(steps) - 1) * (i / (MOMENTS - 1)) ** 2) for i in range(MOMENTS)}
    return [steps[i] for i in sorted(indices)]


_TEMPLATE = """
<h3>Loss by noise level</h3><div class="charts two">{% for each in charts %}{{ each }}{% endfor %}</div>
"""
