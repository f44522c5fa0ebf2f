"""Sweep over sampling settings: one model measured with each combination, which are on the Pareto front, and a plot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ldm.errors import ConfigError, require_package, unknown
from ldm.evaluation.metric import metrics_of_samples
from ldm.evaluation.receipt import Receipt
from ldm.evaluation.runner import measure
from ldm.evaluation.subject import Subject
from ldm.evaluation.table import aligned

EVALUATIONS = "evaluations"
"""Name of the cost of an image: evaluations of the network; those with and without the condition count separately."""


LENGTH = "ema_length"
"""Name of the length of the average of the weights."""


@dataclass(frozen=True)
class Point:
    """One combination of settings.

    Attributes:
        settings: the swept settings by name.
        receipts: the two numbers on the axes; the cost has none.
        values: the values on the axes.
        seconds: time that generating an image took.
    """

    settings: Mapping[str, Any]
    receipts: Sequence[Receipt]
    values: tuple[float, float]
    seconds: float


@dataclass(frozen=True)
class Axis:
    """One of the two compared numbers: its name, and whether lower values are better."""

    name: str
    lower_is_better: bool

    def cost(self, value: float) -> float:
        """Return the value with a sign such that lower is better."""
        return value if self.lower_is_better else -value


@dataclass(frozen=True)
class Sweep:
    """Result of a sweep.

    Attributes:
        axes: the compared numbers.
        points: combinations of settings in the order of the sweep.
    """

    axes: tuple[Axis, Axis]
    points: Sequence[Point]

    @property
    def front(self) -> list[bool]:
        """True for each point on the Pareto front: no other is better in one number and at least as good in the other."""
        costs = [
            tuple(axis.cost(value) for axis, value in zip(self.axes, point.values, strict=True))
            for point in self.points
        ]
        return [not any(_dominates(other, own) for other in costs) for own in costs]

    @property
    def table(self) -> str:
        """The points as text, those on the front marked with ``*``."""
        names = list(self.points[0].settings)
        rows = [["", *names, *(axis.name for axis in self.axes), "s/image"]]
        for point, on_front in zip(self.points, self.front, strict=True):
            texts = {each.conditions.metric: each.text for each in point.receipts}
            numbers = [texts.get(axis.name, f"{value:g}") for axis, value in zip(self.axes, point.values, strict=True)]
            settings = [str(point.settings[name]) for name in names]
            rows.append(["*" if on_front else "", *settings, *numbers, f"{point.seconds:.3f}"])
        return aligned(rows)

    def plot(self, path: Path) -> None:
        """Write a plot of the points with their intervals, the front connected.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        require_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.add_subplot()
        for point, on_front in zip(self.points, self.front, strict=True):
            limits = {each.conditions.metric: (each.low, each.high) for each in point.receipts}
            errors = [_whisker(value, limits.get(a.name)) for a, value in zip(self.axes, point.values, strict=True)]
            color = "tab:blue" if on_front else "tab:gray"
            axes.errorbar(*point.values, xerr=errors[0], yerr=errors[1], fmt="o", color=color, elinewidth=0.6)
            label = ", ".join(f"{each}" for each in point.settings.values())
            axes.annotate(label, point.values, textcoords="offset points", xytext=(4, 4), fontsize=7)
        chosen = sorted(p.values for p, on_front in zip(self.points, self.front, strict=True) if on_front)
        axes.plot(*zip(*chosen, strict=True), color="tab:blue", linewidth=0.8)
        labels = [f"{a.name} ({'lower' if a.lower_is_better else 'higher'} is better)" for a in self.axes]
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_title(f"labels: {', '.join(self.points[0].settings)}; blue: Pareto front", fontsize=9)
        FigureCanvasAgg(figure).print_png(str(path))


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def _whisker(value: float, limits: tuple[float, float] | None) -> list[list[float]] | None:
    """Return the lengths below and above a value; None without a finite interval."""
    if limits is None or float("inf") in (-limits[0], limits[1]):
        return None
    return [[value - limits[0]], [limits[1] - value]]


def require_matplotlib() -> None:
    """Check that matplotlib is installed, before the images are generated rather than after it.

    Raises:
        MissingExtraError: it is not installed.
    """
    require_package("matplotlib", "the plot of a sweep", "toy")


def sweep(
    subject: Subject,
    values: Mapping[str, Sequence[Any]],
    names: Sequence[str],
    progress: Callable[[str], object] = lambda name: None,
    average: Callable[[float], Subject] | None = None,
) -> Sweep:
    """Measure a model with each combination of settings, with the same captions and seeds.

    Args:
        subject: a model of captions, of classes, or without a condition.
        values: values of the swept settings by name, such as ``{"guidance_scale": [1, 3]}``; sampling settings, and first
            ``ema_length`` for lengths of the average of the weights.
        names: the two numbers to compare: numbers of metrics of samples, such as ``fid`` or ``recall_by_image@1``, or
            ``evaluations``, the evaluations of the network for an image.
        progress: called with the settings of each combination before it is measured.
        average: function that returns the subject with averaged weights of a length.

    Raises:
        ConfigError: a number is unknown, or is not measured for this model, or there are several feature networks.
        SamplingError: a value is not one of its setting.
    """
    if not subject.generates:
        raise ConfigError(
            "a sweep needs a model of captions or classes; name one that is trained up to stage denoiser."
        )
    if len(subject.networks) > 1:
        raise ConfigError("a sweep compares numbers of one feature network; give --features once.")
    by_number = metrics_of_samples()
    for name in names:
        if name not in (*by_number, EVALUATIONS):
            raise ConfigError(unknown("number", name, [*by_number, EVALUATIONS]))
    metrics = list({each.name: each for name in names if (each := by_number.get(name)) is not None}.values())
    combinations = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    for settings in combinations:
        subject.sampling_settings({name: each for name, each in settings.items() if name != LENGTH})
    points, axes, current = [], [Axis(name, True) for name in names], None
    for settings in combinations:
        progress(", ".join(f"{name} {value}" for name, value in settings.items()))
        sampling = {name: value for name, value in settings.items() if name != LENGTH}
        if LENGTH in settings and settings[LENGTH] != current:
            assert average is not None
            current = settings[LENGTH]
            subject = average(current)
        one = replace(subject, settings={**subject.settings, **sampling}, _made={})
        assert one.pipe is not None
        with counted(one.pipe.model.denoiser) as rows:
            made = one.generated()
        receipts = {
            each.conditions.metric: each for each in measure(one, metrics, required=[each.name for each in metrics])
        }
        numbers = []
        for i, name in enumerate(names):
            if name == EVALUATIONS:
                numbers.append(sum(rows) / len(made))
                continue
            if name not in receipts:
                raise ConfigError(f"the number {name!r} is not measured for this model; name another one.")
            axes[i] = Axis(name, receipts[name].better != "higher")
            numbers.append(receipts[name].value)
        shown = [receipts[name] for name in names if name in receipts]
        points.append(Point(settings, shown, (numbers[0], numbers[1]), made.seconds))
    return Sweep((axes[0], axes[1]), points)


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Return a list to which each evaluation of a network adds the number of rows of its batch."""
    rows: list[int] = []
    hook = network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()
