"""The runs of a ladder: ordinary trainings of stage 3 in ``RUN_DIR/forecast/``, each with its config, resumed and reused.

The name of a run has a hash of everything that it shares with the other runs, so that runs of another config or learning rate
are never taken for its own. ``rung.json`` in its folder records the result of a finished run.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.errors import DivergedError, TrainingError, first_line
from ldm.forecast.plan import Plan, Rung
from ldm.formats.tensors import write_json
from ldm.training.experiment import Experiment
from ldm.training.handoff import result_file
from ldm.training.stages import train_stage
from ldm.training.subruns import SCHEDULE, digest, link_latents, with_steps

STAGE = "denoiser"
"""Stage that is forecast."""

FOLDER = "forecast"
"""Folder of the ladders in a run folder."""

RECORD = "rung.json"


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        rung: what was trained.
        loss: lowest loss on the validation data.
        last: loss on them after the last step.
        parameters: number of trained parameters.
        seconds: time that it took, in all sessions.
        recall: for each k, how many of the ``of`` generated images were recognised; see :mod:`ldm.forecast.recall`.
    """

    rung: Rung
    loss: float
    last: float
    parameters: int
    seconds: float
    recall: Mapping[str, Any] = field(default_factory=dict)


def rung_experiment(experiment: Experiment, rung: Rung) -> Experiment:
    """Return the experiment of a run, in a folder of its own."""
    stage, steps = experiment.denoiser, rung.steps
    model = stage.model.with_width(rung.width) if rung.width != 1 else stage.model
    assert model is not None, "a network whose width cannot be changed has rungs of one width"
    train = with_steps(stage.train, steps)
    name = f"width{rung.width:g}_images{rung.images}_steps{steps}" + (f"_seed{rung.seed}" if rung.seed else "")
    name = f"{name}_{digest(experiment, STAGE, SCHEDULE)}"
    data = experiment.data.with_subset(rung.images, experiment.seed)
    return replace(
        experiment,
        name=name,
        run_dir=str(experiment.folder / FOLDER / name),
        seed=experiment.seed + rung.seed,
        data=experiment.data if data is None else data,
        denoiser=replace(stage, model=model, train=train, prompts=(), classes=()),
        trainer=replace(experiment.trainer, loggers=()),
    )


@dataclass(frozen=True)
class Climbed:
    """Trained runs of a ladder.

    Attributes:
        results: results of the finished ones, the most important first.
        diverged: those that diverged.
        seconds: time that all of these took.
    """

    results: list[Result]
    diverged: list[Rung]
    seconds: float


def climb(
    experiment: Experiment,
    plan: Plan,
    parameters: Mapping[float, int],
    measure_recall: Callable[[Path], Mapping[str, Any]],
    say: Callable[[str], object],
    spent: float = 0.0,
) -> Climbed:
    """Train the runs of a plan that are not finished, the most important first.

    Runs that diverge are left out, and so are runs with which the ladder would take longer than its limit, judged by how much
    longer than planned the runs took so far.

    Args:
        experiment: the full experiment, with its predecessors as sources.
        plan: the ladder.
        parameters: trained parameters by width.
        measure_recall: measures the recall of a checkpoint.
        say: called with a line for each run.
        spent: seconds that the measurements before the ladder took.

    Raises:
        Interrupted: a signal stopped a run; the next call goes on from there.
    """
    results: list[Result] = []
    diverged: list[Rung] = []
    taken = late = 0.0  # time of the runs, and how much of it was not planned
    for number, (rung, seconds) in enumerate(zip(plan.rungs, plan.seconds, strict=True), start=1):
        folder = rung_experiment(experiment, rung).folder
        record = read_record(folder, rung)
        head = f"run {number} of {len(plan.rungs)}, {rung}"
        if record.is_new:
            expected = seconds + (max(0.0, late / len(results)) if results else 0.0)
            total = spent + taken + max(0.0, expected - record.seconds)
            if total > plan.limit and results:
                say(f"{head}: left out, since the ladder would take {total:,.0f} s of its {plan.limit:,.0f} s")
                continue
            say(f"{head}: about {seconds:,.0f} s")
            with suppress(DivergedError):  # which the record says
                train_rung(experiment, rung, parameters[rung.width], measure_recall)
            record, before = read_record(folder, rung), ""
        else:
            before = " before"
        taken += record.seconds
        if record.result is None:
            say(f"{head}: left out, since it diverged{before}: {record.diverged}")
            diverged.append(rung)
            continue
        loss = f"loss {record.result.loss:.4g}"
        say(f"{head}: finished before, {loss}" if before else f"{head}: {loss} in {record.seconds:,.0f} s")
        results.append(record.result)
        late += record.seconds - seconds
    return Climbed(results, diverged, taken)


def other_results(experiment: Experiment, results: list[Result], full: Rung) -> list[Result]:
    """Return the finished runs of earlier ladders of the same config, for other budgets, but not ``full`` itself."""
    known = {full, *(each.rung for each in results)}
    found = []
    for path in sorted((experiment.folder / FOLDER).glob(f"*_{digest(experiment, STAGE, SCHEDULE)}/{RECORD}")):
        rung = Rung(**json.loads(path.read_text(encoding="utf-8"))["rung"])
        result = read_record(path.parent, rung).result
        if rung not in known and result is not None:
            found.append(result)
    return found


@dataclass(frozen=True)
class Record:
    """Record of a run.

    Attributes:
        seconds: time that it has taken so far.
        result: its result, if it is finished.
        diverged: the error with which it diverged, if it did.
    """

    seconds: float = 0.0
    result: Result | None = None
    diverged: str = ""

    @property
    def is_new(self) -> bool:
        """True if the run has neither finished nor diverged."""
        return self.result is None and not self.diverged


def read_record(folder: Path, rung: Rung) -> Record:
    """Return the record of a run; an empty one if it has not begun."""
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return Record()
    result = Result(**{**values, "rung": rung}) if "loss" in values else None
    return Record(float(values["seconds"]), result, values.get("diverged", ""))


def train_rung(
    experiment: Experiment, rung: Rung, parameters: int, measure_recall: Callable[[Path], Mapping[str, Any]]
) -> Result:
    """Train a run to its end, or go on with it, and return its result; the time is recorded in any case.

    The arguments are those of :func:`climb`.
    """
    own = rung_experiment(experiment, rung)
    folder = own.folder
    record = read_record(folder, rung)
    if record.result is not None:
        return record.result
    mark = digest(experiment, STAGE, SCHEDULE)
    for other in folder.parent.glob(f"*_images{rung.images}_*_{mark}"):  # with the same subset of the images
        link_latents(other, folder)
    link_latents(experiment.folder, folder)
    start = time.perf_counter()
    values: dict[str, Any] = {}
    try:
        train_stage(own, STAGE)
        losses = _losses(folder / STAGE / "metrics.csv")
        best = folder / STAGE / "best.ckpt"
        recall = measure_recall(best if best.exists() else result_file(own, STAGE))
        values = {"loss": min(losses), "last": losses[-1], "parameters": parameters, "recall": dict(recall)}
    except DivergedError as error:
        values = {"diverged": first_line(error)}
        raise
    finally:
        seconds = record.seconds + time.perf_counter() - start
        if folder.is_dir():
            write_json(folder / RECORD, {"rung": asdict(rung), "seconds": seconds, **values})
    return Result(rung=rung, seconds=seconds, **values)


def _losses(path: Path) -> list[float]:
    """Return the losses of the validations of a run.

    Raises:
        TrainingError: there are none.
    """
    with path.open(newline="", encoding="utf-8") as file:
        found = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    if not found or not all(math.isfinite(each) and each > 0 for each in found):
        raise TrainingError(
            f"{path} has no positive losses of validations, which the forecast is about; give data.val, and a loss that is "
            "positive."
        )
    return found
