"""A comparison from the files to the tables: checks, step times, runs in the order of their seeds, tables after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ldm.ablation import report
from ldm.ablation.comparison import compare
from ldm.ablation.metrics import METRICS, main_number
from ldm.ablation.processes import LOG, run_all, threads_of
from ldm.ablation.recipes import PLAIN, chosen, clip_source, open_recipes, read_recipes
from ldm.ablation.report import Comparison
from ldm.ablation.runs import FOLDER, Run, Task, make_run
from ldm.ablation.step_times import phase_starts, step_times, steps_in, stored_times, time_of
from ldm.errors import CheckpointError, ConfigError, TrainingError
from ldm.evaluation.features import open_network
from ldm.training.experiment import Experiment
from ldm.training.subruns import digest, link_latents, weights_of

FEWEST_STEPS = 2
"""Least number of steps of a run."""


def run_comparison(
    config: Path,
    recipes_file: Path,
    overrides: Sequence[str],
    *,
    minutes: float | None,
    seeds: int,
    command: Callable[[Path], list[str]],
    plain_steps: int | None = None,
    jobs: int = 1,
    by: str | None = None,
    only: Sequence[str] = (),
    repeats: int | None = None,
    features: Sequence[str] = (),
    measured: Path | None = None,
    say: Callable[[str], object] = print,
) -> Comparison:
    """Train and measure each recipe with each seed, and compare them; a repeated call goes on, and reuses what is there.

    Args:
        config: YAML of the experiment.
        recipes_file: YAML of the recipes.
        overrides: overrides of all runs.
        minutes: time of each training, by the measured time of a step; None if ``plain_steps`` are given.
        seeds: number of seeds.
        command: function of the folder of a run that returns the command line of the process that trains it.
        plain_steps: number of steps of ``plain``, whose time is that of each training.
        jobs: number of trainings at once.
        by: name of the number that decides; None for the first of the stage.
        only: names of the recipes; none = all.
        repeats: number of seeds of the metrics that are measured several times; None for that of the stage.
        features: feature networks, as in an evaluation; none = the CLIP of stage 2, if there is one.
        measured: ``measured.json`` of a comparison on another device, whose time counts; None to measure the time on this one.
        say: called with lines on the progress.

    Raises:
        CheckpointError: a feature network is unknown, or not on this machine.
        ConfigError: recipes are invalid, or the time is too short.
        TrainingError: a result of a preceding stage is missing, or runs failed.
        Interrupted: a signal stopped the comparison.
    """
    recipes = chosen(read_recipes(recipes_file), only)
    stage = recipes.stage
    by = main_number(stage, by)
    experiments = open_recipes(config, recipes, overrides)
    _check_distinct({name: digest(each, stage) for name, each in experiments.items()})
    plain = experiments[PLAIN]
    networks = _feature_networks(plain, stage, features, say)
    threads = plain.trainer.threads or threads_of(jobs)
    times = (
        step_times(experiments, stage, threads, say) if measured is None else stored_times(experiments, stage, measured)
    )
    starts = {name: phase_starts(each, stage, len(times.relative[name])) for name, each in experiments.items()}
    if minutes is None:
        assert plain_steps is not None, "either a time or a number of steps is given"
        budget = time_of(plain_steps, times.relative[PLAIN], starts[PLAIN])
        minutes = budget * times.seconds / 60
    else:
        budget = 60 * minutes / times.seconds
    steps = {name: steps_in(budget, times.relative[name], starts[name]) for name in experiments}
    if min(steps.values()) < FEWEST_STEPS:
        slowest = min(steps, key=lambda name: steps[name])
        raise ConfigError(
            f"a time of {minutes:.3g} minutes gives {steps[slowest]} steps of recipe {slowest!r}, of which it needs at least "
            f"{FEWEST_STEPS}; give more."
        )
    judges = tuple(weights_of(each.partition("=")[2]) for each in networks)
    count = METRICS[stage].repeats if repeats is None else repeats
    runs = [
        make_run(each, Task(name, seed, stage, steps[name], count, networks, judges))
        for seed in range(seeds)
        for name, each in experiments.items()
    ]

    def comparison() -> Comparison:
        records = [each.record for each in runs]
        ordered = {name: recipes.overrides[name] for name in experiments}
        rows, judged = compare(ordered, steps, records, by)
        folders = [each.folder for each in runs]
        return Comparison(plain.name, stage, minutes, seeds, times, rows, judged, records, folders)

    waiting = [each for each in runs if not each.record.is_done]
    say(
        f"{len(recipes.overrides)} recipes, {seeds} seed{'s' * (seeds > 1)}: {len(runs)} runs of {minutes:.3g} minutes, "
        f"{len(waiting)} of them not finished; about {len(waiting) * minutes / 60 / jobs:.1f} h without the measurements"
    )
    failed: list[str] = []

    def finished(run: Run, code: int) -> None:
        record = run.record
        found = comparison()
        if record.is_done:
            say(report.line(run, record, found.numbers or METRICS[stage].numbers))
        else:
            failed.append(f"{run.name} (exit code {code}): {_last_line(run.folder / LOG)} See {run.folder / LOG}.")
            say(failed[-1])
        report.write(found, plain.folder / FOLDER)

    for each in waiting:
        link_latents(plain.folder, each.experiment.folder)
    run_all(waiting, command, jobs, threads, finished)
    found = comparison()
    report.write(found, plain.folder / FOLDER)
    say(f"\n{report.text(found)}")
    if failed:
        raise TrainingError(
            f"{len(failed)} of the runs failed, of which the first is {failed[0]} The same command tries them again."
        )
    return found


def _feature_networks(
    plain: Experiment, stage: str, given: Sequence[str], say: Callable[[str], object]
) -> tuple[str, ...]:
    """Return the feature networks of the measurements, each of which was opened, so that none is missing after the trainings.

    Raises:
        CheckpointError: one that was given cannot be opened.
    """
    source = clip_source(plain)
    if stage == "clip" or plain.data.image_shape[0] != 3 or not (given or source):
        return ()
    networks = tuple(given) or (f"own={source}",)
    try:
        for each in networks:
            open_network(each, torch.device("cpu"))
    except CheckpointError as error:
        if given:
            raise
        say(f"numbers that compare features are left out: {error}")
        return ()
    return networks


def _check_distinct(digests: dict[str, str]) -> None:
    """Check that no two recipes are the same training.

    Raises:
        ConfigError: two are.
    """
    known: dict[str, str] = {}
    for name, mark in digests.items():
        if mark in known:
            raise ConfigError(
                f"recipe {name!r} is the same training as {known[mark]!r}; remove one of them, or choose others with --only."
            )
        known[mark] = name


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].split("\r")[-1] if lines else "no output."
