"""Curves of all metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from ldm.report.charts import Chart, Line
from ldm.report.html import render
from ldm.report.run import Points, Stage


@dataclass(frozen=True)
class Group:
    """Metrics that share a chart.

    Args:
        pattern: regular expression of their names, without ``train/`` and ``val/``; its group, if any, is the label of a line.
        title, y_label: heading of the chart, and label of its axis.
        log_y: see :class:`ldm.report.charts.Chart`.
        y_range: least range of the axis.
        note: a sentence below the heading.
    """

    pattern: str
    title: str
    y_label: str = ""
    log_y: bool | None = None
    y_range: tuple[float, float] | None = None
    note: str = ""


GROUPS = (
    Group(r"loss", "Loss", "loss"),
    Group(r"psnr", "Reconstruction: PSNR", "dB", log_y=False),
    Group(r"ssim", "Reconstruction: SSIM", "SSIM", log_y=False),
    Group(r"text_to_image_(R@\d+)", "Retrieval, caption to image", "recall", False, (0, 1)),
    Group(r"image_to_text_(R@\d+)", "Retrieval, image to caption", "recall", False, (0, 1)),
    Group(r"error", "Reconstruction error", "error per value"),
    Group(r"kl", "KL divergence", "nats per image"),
    Group(r"(generator|discriminator)", "Adversarial losses", "loss", False),
    Group(r"loss_(\d+_\d+)", "Loss by part of the schedule (% of timesteps)", "loss"),
    Group(r"learning_rate", "Learning rate", "", False),
    Group(r"gradient_norm(_max)?", "Gradient norm", "L2 norm", note="Before clipping."),
    Group(
        r"discriminator_gradient_norm(_max)?", "Gradient norm of the discriminator", "L2 norm", note="Before clipping."
    ),
    Group(r"samples_per_second|images_per_second", "Throughput", "samples/s", False, (0, 0)),
    Group(r"data_wait", "Share of the time that waited for data", "share", False, (0, 0.1)),
    Group(r"memory_gib", "Memory", "GiB", False, (0, 0)),
    Group(r"mfu", "Model FLOPs utilization (MFU)", "share of the peak", False, (0, 0)),
)
"""Charts in order; a metric that is in no group has its own chart."""

SPLITS = {"train": "training", "val": "validation"}

ELSEWHERE = re.compile(r"loss_sigma_.*")
"""Metrics that another part of the report shows."""


@dataclass(frozen=True)
class Curve:
    """A metric in a chart.

    Args:
        metric: its name in ``metrics.csv``.
        label: what distinguishes it in its chart.
        smooth: True if it varies from row to row, as losses of single batches do.
        marks: True if it has few values, as validations have.
    """

    metric: str
    label: str
    smooth: bool
    marks: bool


def part(stage: Stage) -> Markup:
    """Return a chart for each group of metrics."""
    return render(
        '<div class="charts">{% for each in charts %}{{ each }}{% endfor %}</div>', charts=charts(stage.metrics)
    )


def charts(metrics: Mapping[str, Points]) -> list[Markup]:
    """Return the charts that there are values for."""
    drawn = []
    for group, curves in grouped(metrics):
        lines = [Line(each.label, metrics[each.metric], i, each.smooth, each.marks) for i, each in enumerate(curves)]
        drawn.append(
            Chart(group.title, lines, group.y_label, log_y=group.log_y, note=group.note, y_range=group.y_range)
        )
    return [html for chart in drawn if (html := chart.html)]


def grouped(metrics: Iterable[str]) -> list[tuple[Group, list[Curve]]]:
    """Return the charts of the metrics with these names, and the curves in each."""
    remaining = [name for name in metrics if not ELSEWHERE.fullmatch(_base(name))]
    others = [Group(re.escape(base), base, base) for base in dict.fromkeys(map(_base, remaining))]
    found = []
    for group in (*GROUPS, *others):
        names = [name for name in remaining if re.fullmatch(group.pattern, _base(name))]
        remaining = [name for name in remaining if name not in names]
        if names:
            found.append((group, [_curve(name, group) for name in names]))
    return found


def _base(name: str) -> str:
    """Return the name of a metric without its part before the slash."""
    return name.partition("/")[2] or name


def _curve(name: str, group: Group) -> Curve:
    prefix, base = name.partition("/")[0], _base(name)
    match = re.fullmatch(group.pattern, base)
    part = next((each for each in match.groups() if each), None) if match else None
    if "gradient_norm" in base:
        label = "maximum" if part else "mean"
    else:
        only = prefix == "system" or base == "images_per_second"  # which earlier versions call train/images_per_second
        label = part.replace("_", "–") if part else group.y_label if only else SPLITS.get(prefix, base)
    return Curve(name, label, smooth=prefix == "train" and base != "learning_rate", marks=prefix == "val")
