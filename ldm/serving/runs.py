"""The folder of training runs: which runs there are, and what is known of each, as they are while they train."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError, LdmError, TrainingError, first_line
from ldm.report.metrics import Progress
from ldm.report.run import Run, Stage, stage_of
from ldm.report.sections.previews import TITLES, evenly
from ldm.training.environment import SESSIONS
from ldm.training.lock import is_locked
from ldm.training.tasks import TASKS

MAX_DEPTH = 3
"""Depth of the folders in which runs are looked for."""

MAX_RUNS = 1000
"""Largest number of runs in the list, the newest ones."""

MAX_IMAGES = 500
"""Largest number of images of one name in the description of a run, evenly spaced over the training."""

MAX_FIELDS, MAX_TEXT = 2000, 1000
"""Largest number of config fields, and of characters of each, in the description of a run."""


FILES_OF_STAGE = ("metrics.csv", SESSIONS, ".lock.json", "images", "pictures")
"""Files and folders of a stage that the summary of a run depends on, besides its result."""


class UnknownRunError(LdmError):
    """A run, or a file of it, that is not in the list."""


@dataclass(frozen=True)
class StageSummary:
    """A stage in the list of runs.

    Args:
        name, title: its name in the config, and for readers.
        status: training, finished or stopped.
        step, max_steps: newest step, and number of steps of the training.
        monitor: name of the metric that selects the best checkpoint.
        best: step and value of its best validation.
        samples_per_second: newest throughput.
        seconds_left: seconds to the end of the training.
    """

    name: str
    title: str
    status: str
    step: int
    max_steps: int | None
    monitor: str
    best: tuple[int, float] | None
    samples_per_second: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class RunSummary:
    """A run in the list.

    Args:
        name: its name in requests, the path of its folder in the folder of the runs.
        title: name in its config.
        status: training, finished, stopped or unreadable.
        updated: time of its last change, in seconds since 1970.
        error: why it cannot be read.
        stages: its stages, in the order of training.
    """

    name: str
    title: str
    status: str
    updated: float
    error: str | None = None
    stages: list[StageSummary] = field(default_factory=list)


@dataclass(frozen=True)
class Previews:
    """Images of one name, as steps and names of files, and their title for readers."""

    title: str
    files: list[tuple[int, str]]


@dataclass(frozen=True)
class StageDescription:
    """Description of a stage without its metrics.

    Args:
        name, title: its name in the config, and for readers.
        images: images made during the training.
        animations: names of the files of the newest animations.
        resumed: steps at which the training was resumed.
    """

    name: str
    title: str
    images: list[Previews]
    animations: list[str]
    resumed: list[int]


@dataclass(frozen=True)
class RunDescription:
    """Description of a run without its metrics; ``config`` has the text of each field by its dotted name."""

    name: str
    config: dict[str, str]
    stages: list[StageDescription]


@dataclass
class _Known:
    """Cached state of a run between requests."""

    folder: Path
    state: Any = None
    summary: RunSummary | None = None
    progress: dict[str, Progress] = field(default_factory=dict)


class RunsFolder:
    """The runs in a folder.

    Requests name runs, stages and images of its lists, never paths. Of metrics only what was appended is read.

    Args:
        folder: a folder with run folders, up to three levels deep, or one run folder.

    Raises:
        ConfigError: it is not a folder.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ConfigError(f"the folder of runs {folder} does not exist; give one with run folders, such as runs.")
        self.folder = folder
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def summaries(self) -> list[RunSummary]:
        """Return what the list shows of each run: first those that train, by name, then the others, the last changed first."""
        with self._lock:
            found = find_runs(self.folder)
            self._known = {name: self._known.get(name) or _Known(folder) for name, folder in found.items()}
            every = [_summary(name, known) for name, known in self._known.items()]
        training = [each for each in every if each.status == "training"]
        others = [each for each in every if each.status != "training"]
        return [
            *sorted(training, key=lambda run: run.name),  # in an order that stays while they train
            *sorted(others, key=lambda run: run.updated, reverse=True),
        ]

    def describe(self, name: str) -> RunDescription:
        """Return config, images and sessions of a run.

        Raises:
            UnknownRunError, TrainingError: there is no such run, or it cannot be read.
        """
        with self.opened(name) as run:
            return RunDescription(
                name,
                dict(islice(flattened(run.config), MAX_FIELDS)),
                [
                    StageDescription(
                        stage.name,
                        TASKS[stage.name].title,
                        [
                            Previews(TITLES.get(kind, kind), [(step, path.name) for step, path in shown])
                            for kind, files in stage.images.items()
                            if (shown := evenly(files, MAX_IMAGES))
                        ],
                        [path.name for path in stage.animations],
                        [int(session.start["step"]) for session in stage.sessions if session.start.get("step")],
                    )
                    for stage in run.stages
                ],
            )

    @contextmanager
    def opened(self, name: str) -> Iterator[Run]:
        """Yield a run.

        Raises:
            UnknownRunError, TrainingError: there is no such run, or it cannot be read.
        """
        folder = self._find(name)
        with readable(name):
            yield Run(folder)

    def stage(self, run: str, stage: str) -> Stage:
        """Return a stage of a run, without what the config has of it.

        Raises:
            UnknownRunError: there is no such run or stage.
        """
        if stage not in TASKS:
            raise UnknownRunError(f"there is no stage {stage!r}; the stages are {', '.join(TASKS)}.")
        return stage_of(self._find(run), stage)

    def _find(self, name: str) -> Path:
        with self._lock:
            if name not in self._known:  # perhaps it began after the last list
                found = find_runs(self.folder)
                self._known |= {each: _Known(folder) for each, folder in found.items() if each not in self._known}
            if name not in self._known:
                raise UnknownRunError(f"there is no run {name[:200]!r} in the folder of the server.")
            return self._known[name].folder


def find_runs(folder: Path) -> dict[str, Path]:
    """Return the run folders in a folder by their names in it; if it is a run folder itself, this one alone."""
    if _is_run(folder):
        return {folder.resolve().name: folder}
    found: dict[str, Path] = {}
    level = {"": folder}
    seen = {folder.resolve()}
    for _ in range(MAX_DEPTH):
        below: dict[str, Path] = {}
        for name, parent in level.items():
            for child in _folders(parent):
                resolved = child.resolve()
                if resolved not in seen:  # a link to a folder above would lead around
                    seen.add(resolved)
                    (found if _is_run(child) else below)[f"{name}{child.name}"] = child
        level = {f"{name}/": child for name, child in below.items()}
    newest = sorted(found, key=lambda name: _stat(found[name]) or (), reverse=True)[:MAX_RUNS]
    return {name: found[name] for name in newest}


def _is_run(folder: Path) -> bool:
    return _is_folder(folder) and any((folder / name).exists() for name in ("config.yaml", *TASKS))


def _folders(parent: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden and whose names can be written in JSON."""
    try:
        children = sorted(parent.iterdir())
    except OSError:
        return []
    return [each for each in children if not each.name.startswith(".") and each.name.isprintable() and _is_folder(each)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn errors of reading a run, whose files may be anything, into a sentence.

    Raises:
        TrainingError: the run cannot be read.
    """
    try:
        yield
    except LdmError:
        raise
    except Exception as error:  # whatever the files hold, it is no defect of the server
        raise TrainingError(
            f"the files of the run {name} cannot be read ({type(error).__name__}: {first_line(error)}); "
            "are they of a training?"
        ) from error


def _summary(name: str, known: _Known) -> RunSummary:
    """Return the summary of a run, that of before if no file of it has changed."""
    updated = 0.0
    try:
        with readable(name):
            state = _state(known.folder)
            updated = max((found[0] for found in state[0] if found), default=0.0)
            if known.summary is None or state != known.state:
                run = Run(known.folder, known.progress)
                stages = [_stage_summary(stage) for stage in run.stages]
                known.summary, known.state = RunSummary(name, run.name, _status(stages), updated, None, stages), state
            return known.summary
    except LdmError as error:
        known.summary = None
        return RunSummary(name, name, "unreadable", updated, str(error))


def _stage_summary(stage: Stage) -> StageSummary:
    return StageSummary(
        stage.name,
        TASKS[stage.name].title,
        stage.status,
        stage.step,
        stage.max_steps,
        stage.monitor,
        stage.best,
        stage.samples_per_second,
        stage.seconds_left,
    )


def _status(stages: list[StageSummary]) -> str:
    statuses = {stage.status for stage in stages}
    return next(each for each in ("training", "stopped", "finished") if each in statuses)


def _state(folder: Path) -> tuple[list[tuple[float, int, int] | None], list[bool]]:
    """Return time, size and inode of each file that the summary depends on, and which stages are being trained."""
    paths = [folder, folder / "config.yaml"]
    for name, task in TASKS.items():
        paths += [folder / task.result, *(folder / name / each for each in FILES_OF_STAGE)]
    return [_stat(path) for path in paths], [is_locked(folder / name) for name in TASKS]


def _stat(path: Path) -> tuple[float, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime, found.st_size, found.st_ino


def flattened(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted names of all values in a config, with their texts."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flattened(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list) and any(isinstance(each, Mapping) for each in values):
        for i, value in enumerate(values):
            yield from flattened(value, f"{name}[{i}]")
    elif name:
        text = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False, default=str)
        yield name[:MAX_TEXT], text[:MAX_TEXT]
