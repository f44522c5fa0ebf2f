"""Sweep over sampling settings: one model measured with each combination, which are on the Pareto front, and a plot."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ldm.errors import ConfigError, DataError, require_package, unknown
from ldm.evaluation.metric import Metric, metrics_of_samples
from ldm.evaluation.opening import Request
from ldm.evaluation.receipt import Receipt, read_receipts
from ldm.evaluation.runner import measure, receipts_of, weights_of
from ldm.evaluation.subject import Subject
from ldm.evaluation.table import aligned
from ldm.formats.tensors import write_atomically

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


class SweepFolder:
    """Folder of a sweep: receipts of each combination, written as soon as they are measured, so that a repeated sweep goes on.

    ``sweep.json`` has the points with what they were measured on; a point of other weights, data or arguments is measured again.

    Args:
        path: the folder, which is made for the first point.
        request: arguments of the evaluation, without swept settings.
        subject: its subject.
        names: the two compared numbers.
    """

    FILE = "sweep.json"

    def __init__(self, path: Path, request: Request, subject: Subject, names: Sequence[str]):
        by_number = metrics_of_samples()
        metrics = tuple(dict.fromkeys(by_number[name].name for name in names if name in by_number))
        self.path, self._request, self._subject, self._names = path, replace(request, metrics=metrics), subject, names

    @functools.cached_property
    def _of(self) -> list[str]:
        """Hashes of the weights and of the images of all splits."""
        images = [each.fingerprint for each in self._subject.sets.values()]
        return [weights_of(self._subject, "samples"), *images]

    @functools.cached_property
    def _before(self) -> dict[str, Any]:
        """Entries of ``sweep.json`` that were measured on the same, by their files of receipts."""
        try:
            entries = json.loads((self.path / self.FILE).read_text(encoding="utf-8"))
            return {each["receipts"]: each for each in entries if each["of"] == self._of}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def read(self, settings: Mapping[str, Any]) -> Point | None:
        """Return the point of a combination that was measured before; None if it was not."""
        request = self._with(settings)
        entry = self._before.get(self._file(request), {})
        try:
            values = (float(entry[self._names[0]]), float(entry[self._names[1]]))
            receipts = read_receipts(self.path / self._file(request))
        except (KeyError, DataError):
            return None
        if receipts.request != receipts_of(request, self._subject, ()).request:
            return None
        return Point(settings, receipts.numbers, values, entry["seconds"])

    def keep(self, point: Point) -> None:
        """Write the receipts of a point."""
        self.path.mkdir(parents=True, exist_ok=True)
        request = self._with(point.settings)
        receipts_of(request, self._subject, point.receipts).write(self.path / self._file(request))

    def write(self, found: Sweep) -> None:
        """Write ``sweep.json`` and ``sweep.txt`` of the points up to now."""
        entries = [
            {"settings": each.settings, "pareto": on_front, "receipts": self._file(self._with(each.settings))}
            | dict(zip(self._names, each.values, strict=True))
            | {"seconds": each.seconds, "of": self._of}
            for each, on_front in zip(found.points, found.front, strict=True)
        ]
        for name, text in ((self.FILE, json.dumps(entries, indent=2)), ("sweep.txt", found.table)):
            write_atomically(self.path / name, functools.partial(Path.write_text, data=f"{text}\n"))

    def _with(self, settings: Mapping[str, Any]) -> Request:
        sampling = {name: each for name, each in settings.items() if name != LENGTH}
        return replace(self._request, ema_length=settings.get(LENGTH), settings=sampling)

    @staticmethod
    def _file(request: Request) -> str:
        return f"receipts{request.suffix}.json"


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
    folder: SweepFolder | None = None,
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
        folder: where points are kept, from which those that were measured before are taken; None for nowhere.

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
    points: list[Point] = []
    current = None
    for settings in combinations:
        point = None if folder is None else folder.read(settings)
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
        progress(text if point is None else f"{text}: measured before")
        if point is None:
            if LENGTH in settings and settings[LENGTH] != current:
                assert average is not None
                current = settings[LENGTH]
                subject = average(current)
            point = _measured(subject, settings, metrics, names)
            if folder is not None:
                folder.keep(point)
        points.append(point)
        if folder is not None:
            folder.write(_sweep(names, points))
    return _sweep(names, points)


def _measured(subject: Subject, settings: Mapping[str, Any], metrics: Sequence[Metric], names: Sequence[str]) -> Point:
    """Measure a combination of settings; the subject has the averaged weights that belong to it."""
    sampling = {name: value for name, value in settings.items() if name != LENGTH}
    one = replace(subject, settings={**subject.settings, **sampling}, _made={})
    assert one.pipe is not None
    with counted(one.pipe.model.denoiser) as rows:
        made = one.generated()
    receipts = {
        each.conditions.metric: each for each in measure(one, metrics, required=[each.name for each in metrics])
    }
    numbers = []
    for name in names:
        if name == EVALUATIONS:
            numbers.append(sum(rows) / len(made))
            continue
        if name not in receipts:
            raise ConfigError(f"the number {name!r} is not measured for this model; name another one.")
        numbers.append(receipts[name].value)
    shown = [receipts[name] for name in names if name in receipts]
    return Point(settings, shown, (numbers[0], numbers[1]), made.seconds)


def _sweep(names: Sequence[str], points: Sequence[Point]) -> Sweep:
    better = {each.conditions.metric: each.better for point in points for each in point.receipts}
    first, second = (Axis(name, better.get(name) != "higher") for name in names)
    return Sweep((first, second), list(points))


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Return a list to which each evaluation of a network adds the number of rows of its batch."""
    rows: list[int] = []
    hook = network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()
