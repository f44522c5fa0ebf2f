"""A forecast from beginning to end: measurements on this machine, the ladder, the fit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldm import __version__
from ldm.errors import ConfigError, TrainingError
from ldm.forecast.answers import WORTHWHILE, Forecast, Point, make_forecast
from ldm.forecast.bands import FEWEST
from ldm.forecast.ladder import FOLDER, STAGE, Result, climb, other_results, train_rung
from ldm.forecast.learning_rate import LearningRate, RangeTest, range_test
from ldm.forecast.plan import FULL, MIDDLE, SHARE, SMALL, Extras, Plan, Rung, Size, make_plan
from ldm.forecast.recall import RecallMeasure, captions_measured
from ldm.forecast.sentences import sentences
from ldm.formats.tensors import write_json
from ldm.training.environment import device_name
from ldm.training.experiment import Experiment
from ldm.training.probe import MEASURED, WARM_UP, Probe
from ldm.training.subruns import SCHEDULE, digest, with_predecessors

MEASUREMENTS, RESULT, VERIFICATION = "measured.json", "forecast.json", "verification.json"

RANGE_STEPS = (20, 100)
"""Least and largest number of steps of the learning-rate range test; it takes a tenth of the ladder's time between them."""

START = 1.0
"""Time in which a training starts and ends, in seconds, besides opening networks and data."""

FORMAT = 2
"""Version of the file of the measurements."""


@dataclass(frozen=True)
class Measured:
    """Measurements on this machine, made once for a config.

    Attributes:
        device: name of the device.
        sizes: networks by width.
        images, held_out: numbers of training and validation images.
        opening: time in which a training opens networks and data, and compiles the networks, in seconds.
        test: learning-rate range test of the full network.
        seconds: time that all of it took.
    """

    device: str
    sizes: Mapping[float, Size]
    images: int
    held_out: int
    opening: float
    test: RangeTest
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A forecast with everything that it rests on."""

    experiment: Experiment
    measured: Measured
    plan: Plan
    results: Sequence[Result]
    diverged: Sequence[Rung]
    forecast: Forecast
    sentences: Sequence[str]
    seconds: float
    measure_recall: RecallMeasure

    @property
    def folder(self) -> Path:
        return self.experiment.folder / FOLDER

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "ldm": __version__,
            "digest": digest(self.experiment, STAGE, SCHEDULE),
            "learning_rate": self.experiment.denoiser.train.learning_rate,
            "sentences": list(self.sentences),
            "forecast": asdict(self.forecast),
            "ladder": {
                "limit_seconds": self.plan.limit,
                "seconds": self.seconds,
                "full_seconds": self.plan.full_seconds,
            },
            "full": asdict(self.plan.full),
            "runs": [asdict(each) for each in self.results],
            "diverged": [asdict(each) for each in self.diverged],
            "measured": asdict(self.measured),
        }


@dataclass(frozen=True)
class Verification:
    """The full run of a forecast, and what had been forecast.

    Attributes:
        result: result of the full run.
        forecast: its forecast.
        seconds: time of the ladder, with all measurements.
    """

    result: Result
    forecast: Point
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """Sentences on the results of the full run, their forecasts, and the time of the ladder."""
        recalls = {k: band for k, band in self.forecast.recall.items() if k in self.result.recall}
        rows = [("held-out loss", self.result.loss, self.forecast.loss)]
        rows += [(f"R@{k}", self.result.recall[k] / self.result.recall["of"], band) for k, band in recalls.items()]
        share = self.seconds / self.result.seconds
        return [
            *(
                f"{name} {value:.4g}: {'in' if band.low <= value <= band.high else 'outside of'} the forecast "
                f"{band.low:.4g} to {band.high:.4g} (80 %)"
                for name, value, band in rows
            ),
            f"the ladder took {self.seconds:,.0f} s, {share:.0%} of the {self.result.seconds:,.0f} s of the full run",
        ]


def run_forecast(
    experiment: Experiment,
    budget: float | None,
    *,
    learning_rate: LearningRate = "auto",
    train_stages: bool = False,
    worthwhile: float = WORTHWHILE,
    share: float = SHARE,
    say: Callable[[str], object] = print,
) -> Outcome:
    """Measure, train the ladder, and forecast stage 3; a repeated call goes on, and reuses what is there.

    Args:
        experiment: the experiment, whose run folder gets the ladder.
        budget: time of the full run in seconds; None for ``denoiser.train.max_steps`` steps.
        learning_rate: ``config``'s, that of the range ``test``, or ``auto``: that of the config if the test finds it usable.
        train_stages: True to train stages 1 and 2 first if their results are missing.
        worthwhile: see :func:`ldm.forecast.answers.make_forecast`.
        share: largest part of the time of the full run that the ladder takes.
        say: called with lines on the progress.

    Raises:
        ConfigError: there are no validation data, or the full run is too short.
        TrainingError: a result of stages 1 and 2 is missing, or most runs of the ladder diverged.
        Interrupted: a signal stopped a run of the ladder.
    """
    if not experiment.data.has("val"):
        raise ConfigError("data.val is null, but a forecast is about the held-out loss; give validation data.")
    if experiment.trainer.threads:
        torch.set_num_threads(experiment.trainer.threads)  # of the runs, so that measurements hold for them
    experiment = _on_one_device(
        with_predecessors(experiment, STAGE, "a forecast", train_stages, ", or give --train-stages")
    )
    measured = _measure(experiment, budget, share, say)
    rate = experiment.denoiser.train.learning_rate
    say(measured.test.describe(rate))
    rate, before = measured.test.choose(rate, learning_rate), rate
    if rate != before:
        say(f"the ladder and the full run are those with the learning rate {rate:g}")
    train = replace(experiment.denoiser.train, learning_rate=rate)
    experiment = replace(experiment, denoiser=replace(experiment.denoiser, train=train))

    size = measured.sizes[FULL]
    full = Rung(FULL, measured.images, train.max_steps if budget is None else int(budget / size.seconds))
    captions, passes = captions_measured(experiment, measured.held_out, size.forward, full.steps * size.seconds)
    subsets = experiment.data.with_subset(measured.images, experiment.seed) is not None
    extras = Extras(START + measured.opening, measured.held_out, passes)
    plan = make_plan(full, measured.sizes, extras, subsets=subsets, share=share, spent=measured.seconds)
    say(
        f"full run: {full.steps:,} steps in {plan.full_seconds:,.0f} s on {measured.device}; ladder: {len(plan.rungs)} runs in "
        f"{sum(plan.seconds) + measured.seconds:,.0f} s, at most {plan.limit:,.0f} s"
    )
    if passes > plan.evaluations:
        say("R@k is not measured, since there is no time for it; a longer --budget has some")
    parameters = {width: each.parameters for width, each in measured.sizes.items()}
    measure_recall = RecallMeasure(experiment, captions if plan.evaluations else 0)
    climbed = climb(experiment, plan, parameters, measure_recall, say, measured.seconds)
    results = climbed.results + other_results(experiment, climbed.results, full)
    if climbed.diverged and len(results) < FEWEST:
        raise TrainingError(
            f"{len(climbed.diverged)} of {len(plan.rungs)} runs of the ladder diverged, and a forecast needs {FEWEST} that do "
            "not; lower denoiser.train.learning_rate, or give --learning-rate test."
        )
    forecast = make_forecast(results, full, measured.sizes, worthwhile, experiment.seed)
    found = list(sentences(forecast, measured.device, worthwhile))
    if climbed.diverged:
        found.append(
            f"Left out, since they diverged: {'; '.join(map(str, climbed.diverged))}. The full run may diverge, too; a lower "
            "learning rate is safer."
        )
    seconds = measured.seconds + climbed.seconds
    outcome = Outcome(experiment, measured, plan, results, climbed.diverged, forecast, found, seconds, measure_recall)
    write_json(outcome.folder / RESULT, outcome.to_dict())
    return outcome


def verify(outcome: Outcome, say: Callable[[str], object] = print) -> Verification:
    """Train the full run of a forecast, or go on with it, and compare it with the forecast, which does not use it.

    Raises:
        Interrupted: a signal stopped the run.
    """
    plan, point = outcome.plan, outcome.forecast.full
    say(f"the full run itself, {plan.full}: about {plan.full_seconds:,.0f} s")
    parameters = outcome.measured.sizes[FULL].parameters
    result = train_rung(outcome.experiment, plan.full, parameters, outcome.measure_recall)
    found = Verification(result, point, outcome.seconds)
    write_json(outcome.folder / VERIFICATION, asdict(found))
    return found


def _on_one_device(experiment: Experiment) -> Experiment:
    """Return the experiment on one device, with gradients accumulated to the batch of all of its devices."""
    trainer, train = experiment.trainer, experiment.denoiser.train
    devices = max(1, torch.cuda.device_count()) if trainer.accelerator != "cpu" else 1
    devices = trainer.devices if isinstance(trainer.devices, int) else devices
    count = devices * (trainer.num_nodes if isinstance(trainer.num_nodes, int) else 1)
    if count == 1:
        return experiment
    return replace(
        experiment,
        trainer=replace(trainer, devices=1, num_nodes=1, strategy="auto"),
        denoiser=replace(experiment.denoiser, train=replace(train, accumulate=count * train.accumulate)),
    )


def _measure(experiment: Experiment, budget: float | None, share: float, say: Callable[[str], object]) -> Measured:
    """Time steps of each width and try learning rates, or read what was measured for the same config on this device."""
    device = device_name(experiment.trainer)
    path = experiment.folder / FOLDER / MEASUREMENTS
    key = {
        "format": FORMAT,
        "digest": digest(experiment, STAGE, SCHEDULE),
        "threads": experiment.trainer.threads,
        "widths": [FULL, MIDDLE, SMALL],
    }
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {name: values.pop(name, None) for name in key}
        if known == key and values.get("device") == device:
            test = RangeTest.from_dict(values.pop("test"))
            sizes = {float(width): Size(**size) for width, size in values.pop("sizes").items()}
            return Measured(**values, sizes=sizes, test=test)
    say("measuring the time of a step, and trying learning rates")
    probe = Probe(experiment, STAGE, WARM_UP + MEASURED + RANGE_STEPS[1])
    start, images = time.perf_counter(), probe.images
    sizes = {}
    builds, compiling = [probe.build], [_add_size(sizes, FULL, probe)]
    steps = experiment.denoiser.train.max_steps if budget is None else budget / sizes[FULL].seconds
    test = range_test(probe.step, round(min(max(share * steps / 10, RANGE_STEPS[0]), RANGE_STEPS[1])))
    del probe
    seconds = time.perf_counter() - start
    for width in (MIDDLE, SMALL):
        model = experiment.denoiser.model.with_width(width) if experiment.denoiser.train.init is None else None
        if model is None or model == experiment.denoiser.model:
            continue
        probe = Probe(
            replace(experiment, denoiser=replace(experiment.denoiser, model=model)), STAGE, WARM_UP + MEASURED
        )
        builds.append(probe.build)
        if probe.parameters not in [each.parameters for each in sizes.values()]:
            start = time.perf_counter()
            compiling.append(_add_size(sizes, width, probe))
            seconds += time.perf_counter() - start
    build = min(builds)  # the first also imports what training needs
    seconds += build * len(builds)
    opening = 2 * build + median(compiling)  # a training, and the measurement of its recall
    found = Measured(device, sizes, images, len(experiment.data.open("val")), opening, test, seconds)
    write_json(path, {**key, **asdict(found)})
    return found


def _add_size(sizes: dict[float, Size], width: float, probe: Probe) -> float:
    """Measure a network, and return how much longer the first step took than later ones."""
    first, seconds = probe.first_and_median()
    sizes[width] = Size(probe.parameters, seconds, probe.train.batch_size * probe.train.accumulate)
    return max(0.0, first - seconds)
