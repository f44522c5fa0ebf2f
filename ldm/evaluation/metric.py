"""Interface of a metric: the numbers that it yields, and the registry of metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ldm.discovery import import_modules
from ldm.errors import ConfigError, unknown
from ldm.evaluation.features import FeatureNetwork
from ldm.evaluation.intervals import Estimate

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject

Better = Literal["higher", "lower", "neither"]
"""Which of two values is the better one."""

Part = Literal["samples", "vae", "clip", "denoiser"]
"""Object that a metric measures: generated images, the first stage, the CLIP of stage 2, or the denoiser."""


@dataclass(frozen=True)
class Number:
    """A number that a metric yields, with everything that distinguishes it from other numbers of the same name.

    Attributes:
        name: name, such as ``fid``.
        estimate: value and interval.
        n: number of images or captions that it was measured on.
        better: which of two values is the better one.
        unit: unit; empty for a number without one.
        network: feature network.
        reference: split whose images it was compared with.
        parameters: parameters of the metric, as values of JSON.
        decoder: decoder that was used in place of that of the first stage; None for none.
    """

    name: str
    estimate: Estimate
    n: int
    better: Better
    unit: str = ""
    network: FeatureNetwork | None = None
    reference: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    decoder: nn.Module | None = None


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes:
        name: name on the command line.
        part: what it measures.
        run: generator of its numbers; it yields none for a subject that it does not apply to.
        by_default: whether it is measured if no metrics are named; the others take minutes, or weights of other projects.
        numbers: names of its numbers, if it measures samples: what a sweep can compare.
    """

    name: str
    part: Part
    run: Callable[[Subject], Iterator[Number]]
    by_default: bool
    numbers: Sequence[str]


METRICS: dict[str, Metric] = {}
"""Metrics by name; :func:`all_metrics` imports those of the folder ``metrics``."""


def metric(
    name: str, part: Part, by_default: bool = True, numbers: Sequence[str] = ()
) -> Callable[[Callable[[Subject], Iterator[Number]]], Callable[[Subject], Iterator[Number]]]:
    """Register a generator of numbers as a :class:`Metric`; without ``numbers``, its one number has its name."""

    def register(function: Callable[[Subject], Iterator[Number]]) -> Callable[[Subject], Iterator[Number]]:
        METRICS[name] = Metric(name, part, function, by_default, numbers or (name,))
        return function

    return register


def all_metrics() -> dict[str, Metric]:
    """Return all metrics by name, sorted by what they measure."""
    import_modules("ldm.evaluation.metrics")
    order = ("vae", "clip", "denoiser", "samples")
    return dict(sorted(METRICS.items(), key=lambda item: (order.index(item[1].part), item[0])))


def metrics_of_samples() -> dict[str, Metric]:
    """Return the metrics of generated images by the names of their numbers."""
    return {number: each for each in all_metrics().values() if each.part == "samples" for number in each.numbers}


def chosen(names: list[str]) -> list[Metric]:
    """Return metrics by name, or by what they measure, or ``all``; those that are measured by default if there are no names.

    Raises:
        ConfigError: a name is unknown.
    """
    known = all_metrics()
    if not names:
        return [each for each in known.values() if each.by_default]
    parts = {each.part for each in known.values()}
    for name in names:
        if name not in {*known, *parts, "all"}:
            raise ConfigError(unknown("metric", name, {*known, *parts, "all"}))
    return [each for each in known.values() if {each.name, each.part, "all"} & {*names}]
