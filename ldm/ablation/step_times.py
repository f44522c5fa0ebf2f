"""Steps of equal time: the time of a step of each recipe relative to that of ``plain``.

Both are measured in turn, a few steps of each, in several rounds, so that a load that comes and goes slows both. The times are
kept in ``measured.json``; they are measured once, so the number of steps does not depend on the load during the trainings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldm.ablation.recipes import PLAIN
from ldm.ablation.runs import FOLDER, on_one_device
from ldm.errors import ConfigError, LdmError
from ldm.formats.tensors import write_json
from ldm.training.environment import device_name
from ldm.training.experiment import Experiment
from ldm.training.probe import WARM_UP, Probe
from ldm.training.subruns import SCHEDULE, digest, link_latents

MEASUREMENTS = "measured.json"

ROUNDS, EACH = 5, 3
"""Rounds, and steps of each recipe in a round."""


@dataclass(frozen=True)
class StepTimes:
    """Times of a step of the recipes.

    Attributes:
        device: name of the device.
        threads: number of CPU threads.
        seconds: time of a step of ``plain``, before further networks are trained.
        relative: for each recipe, the time of a step in units of that: first of a step in which nothing but the network is
            trained, then of one in which the discriminator is trained as well, if there is one.
    """

    device: str
    threads: int
    seconds: float
    relative: Mapping[str, Sequence[float]]


def steps_in(budget: float, times: Sequence[float], starts: Callable[[int], Sequence[int]]) -> int:
    """Return the largest number of steps that fit into a time.

    Args:
        budget: the time.
        times: time of a step in each phase, in the same unit.
        starts: function of the number of steps that returns the first step of each phase.
    """

    limit = budget * (1 + 1e-9)  # rounding
    low, high = 0, 1
    while time_of(high, times, starts) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if time_of(middle, times, starts) <= limit else (low, middle)
    return low


def time_of(steps: int, times: Sequence[float], starts: Callable[[int], Sequence[int]]) -> float:
    """Return the time of a number of steps; the arguments are those of :func:`steps_in`."""
    first = [min(steps, each) for each in starts(steps)]
    return sum((end - start) * each for start, end, each in zip(first, [*first[1:], steps], times, strict=True))


def phase_starts(experiment: Experiment, stage: str, phases: int) -> Callable[[int], Sequence[int]]:
    """Return the function of :func:`steps_in` for a stage, of which all but stage ``vae`` have one phase."""
    if phases == 1 or stage != "vae":
        return lambda steps: (0,)
    return lambda steps: (0, experiment.vae.loss.discriminator_step(steps))


def step_times(
    experiments: Mapping[str, Experiment], stage: str, threads: int, say: Callable[[str], object]
) -> StepTimes:
    """Measure the times of a step of those recipes that were not measured before for this config and device.

    Args:
        experiments: experiment of each recipe.
        stage: trained stage.
        threads: number of CPU threads of a run.
        say: called with lines on the progress.

    Raises:
        LdmError: a recipe cannot be trained; the message names it.
    """
    plain = experiments[PLAIN]
    path = plain.folder / FOLDER / MEASUREMENTS
    device = device_name(plain.trainer)
    marks = {name: digest(each, stage, SCHEDULE) for name, each in experiments.items()}
    key = {"stage": stage, "plain": marks[PLAIN], "device": device}
    found = [each for each in _read(path) if all(each.get(name) == value for name, value in key.items())]
    kept: dict[str, Any] = found[0] if found else {**key, "threads": threads, "seconds": None, "relative": {}}
    missing = [name for name, mark in marks.items() if mark not in kept["relative"]]
    if missing:
        before = torch.get_num_threads()
        torch.set_num_threads(kept["threads"])
        try:
            _measure({name: experiments[name] for name in missing}, plain, stage, marks, kept, say)
        finally:
            torch.set_num_threads(before)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # of the networks that were measured, for the processes that train
            others = [each for each in _read(path) if any(each.get(name) != value for name, value in key.items())]
            if kept["relative"]:
                write_json(path, [*others, kept])
    return _times_of(kept, marks)


def stored_times(experiments: Mapping[str, Experiment], stage: str, path: Path) -> StepTimes:
    """Return the times of a step that were measured elsewhere, such as on a slower machine whose time is to count.

    Args:
        experiments: experiment of each recipe.
        stage: trained stage.
        path: ``measured.json`` of a comparison of the same config.

    Raises:
        ConfigError: it has no times of the config, or of a recipe.
    """
    marks = {name: digest(each, stage, SCHEDULE) for name, each in experiments.items()}
    found = [each for each in _read(path) if (each.get("stage"), each.get("plain")) == (stage, marks[PLAIN])]
    if not found:
        raise ConfigError(
            f"{path} has no times of stage {stage} of this config; give the {MEASUREMENTS} of a comparison of it."
        )
    kept = found[0]
    if missing := [name for name, mark in marks.items() if mark not in kept["relative"]]:
        raise ConfigError(f"{path} has no time of recipe {missing[0]!r}; measure it there, or leave it out by --only.")
    return _times_of(kept, marks)


def _times_of(kept: Mapping[str, Any], marks: Mapping[str, str]) -> StepTimes:
    """Return the times of recipes, given by their hashes, from an entry of the file."""
    relative = {name: tuple(kept["relative"][mark]) for name, mark in marks.items()}
    return StepTimes(kept["device"], kept["threads"], kept["seconds"], relative)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _measure(
    missing: Mapping[str, Experiment],
    plain: Experiment,
    stage: str,
    marks: Mapping[str, str],
    kept: dict[str, Any],
    say: Callable[[str], object],
) -> None:
    """Measure recipes in turn with ``plain``, and add their times to ``kept``."""
    base = _probe(PLAIN, plain, stage)
    base.timed(WARM_UP)
    if kept["seconds"] is None:
        kept["seconds"] = median(base.timed(ROUNDS * EACH))
        say(f"a step of {PLAIN} takes {kept['seconds']:.3g} s on {kept['device']}")
    for name, experiment in missing.items():
        own = replace(experiment, run_dir=str(plain.folder / FOLDER / "measuring"))
        link_latents(plain.folder, own.folder)
        try:
            probe = base if name == PLAIN else _probe(name, own, stage)
            kept["relative"][marks[name]] = _relative(probe, base)
        finally:
            shutil.rmtree(own.folder, ignore_errors=True)
        if name != PLAIN:
            say(
                f"a step of {name} takes {' and then '.join(f'{each:.3g}' for each in kept['relative'][marks[name]])} times that"
            )


def _probe(name: str, experiment: Experiment, stage: str) -> Probe:
    """Open the training of a recipe.

    Raises:
        LdmError: it cannot be trained.
    """
    try:
        return Probe(on_one_device(experiment), stage, 2**31)
    except LdmError as error:
        raise type(error)(f"recipe {name!r}: {error}") from None


def _relative(probe: Probe, base: Probe) -> list[float]:
    """Return the time of a step of each phase of a recipe, in units of the first phase of ``plain``."""
    if probe is not base:
        probe.timed(WARM_UP)
    ratios: list[list[float]] = [[] for _ in probe.starts]
    for _ in range(ROUNDS):
        unit = median(base.timed(EACH, 0))
        for i, start in enumerate(probe.starts):
            if probe is base and i == 0:
                ratios[i].append(1.0)
            else:
                ratios[i].append(median(probe.timed(EACH, start)) / unit)
    return [median(each) for each in ratios]
