"""Contents of a run folder, as far as they are there: runs may be unfinished, or of earlier versions."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ldm.data.bad_samples import BAD_SAMPLES_FILE, read_counts
from ldm.data.filters import DATA_FILE
from ldm.errors import ConfigError, TrainingError
from ldm.report.metrics import Progress, read_rows
from ldm.training.environment import SESSIONS
from ldm.training.lock import is_locked
from ldm.training.tasks import TASKS
from ldm.yaml_text import parse

Points = list[tuple[int, float]]
"""Steps and values of a metric."""

MONITORS = {"psnr": "PSNR", "text_to_image_R@1": "R@1", "loss": "validation loss"}
"""Names for readers of the metrics that select a checkpoint."""


@dataclass
class Session:
    """One call of the training command for a stage.

    Attributes:
        start: record of its beginning, see :mod:`ldm.training.callbacks.sessions`.
        end: record of its end; None if it was killed, or is running.
    """

    start: Mapping[str, Any]
    end: Mapping[str, Any] | None = None


@dataclass
class Stage:
    """Files of a stage, read when they are needed.

    Args:
        name: name of the stage.
        folder: its folder.
        result: file of its result, which may not exist yet.
        settings: its section of the config; empty if unknown.
        progress: what is known from its metrics.
    """

    name: str
    folder: Path
    result: Path
    settings: Mapping[str, Any]
    progress: Progress

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.csv"

    @cached_property
    def metrics(self) -> dict[str, Points]:
        """Finite values of each column of ``metrics.csv``."""
        metrics: dict[str, Points] = {}
        found = read_rows(self.metrics_file)
        for step, values in found.rows:
            for name, value in zip(found.columns, values, strict=True):
                if value is not None:
                    metrics.setdefault(name, []).append((step, value))
        return metrics

    @cached_property
    def images(self) -> dict[str, list[tuple[int, Path]]]:
        """Image files of each preview with their steps, in order."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for path in sorted(self._images_folder.glob("*.png")):
            if match := re.fullmatch(r"(.+)_(\d+)", path.stem):
                found.setdefault(match[1], []).append((int(match[2]), path))
        return {name: sorted(files) for name, files in found.items()}

    @property
    def bad_samples(self) -> list[dict[str, str]]:
        """Rows of ``bad_samples.csv``."""
        return _csv_rows(self.folder / BAD_SAMPLES_FILE)

    @property
    def bad_sample_counts(self) -> dict[str, Counter[str]]:
        """Number of samples that could not be used, by reason, for each split; empty if the file cannot be read."""
        try:
            return read_counts(self.folder / BAD_SAMPLES_FILE)
        except (OSError, csv.Error, KeyError, TypeError, ValueError):
            return {}

    @property
    def animations(self) -> list[Path]:
        return sorted(self._images_folder.glob("*.gif"))

    @property
    def _images_folder(self) -> Path:
        former = self.folder / "pictures"  # its name in earlier versions
        return former if former.is_dir() else self.folder / "images"

    @cached_property
    def sessions(self) -> list[Session]:
        """Sessions in order; empty for runs of earlier versions."""
        sessions: list[Session] = []
        for record in _json_lines(self.folder / SESSIONS):
            if record.get("event") == "start":
                sessions.append(Session(record))
            elif sessions and record.get("pid") == sessions[-1].start.get("pid"):
                sessions[-1].end = record
        return sessions

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the result file, with ``provenance`` as a mapping; empty if there is none."""
        try:
            with safe_open(self.result, framework="numpy") as file:
                metadata: dict[str, Any] = dict(file.metadata() or {})
            provenance = json.loads(metadata.get("provenance", "{}"))
            return {**metadata, "provenance": provenance if isinstance(provenance, dict) else {}}
        except (OSError, SafetensorError, ValueError):
            return {}

    @property
    def is_running(self) -> bool:
        """True if a process trains the stage now."""
        return is_locked(self.folder)

    @property
    def step(self) -> int:
        """Newest step that is known to be completed."""
        # The last session counts, since it may have gone on from an earlier step than the one before it had reached.
        records = [record for session in self.sessions[-1:] for record in (session.start, session.end or {})]
        records = records or [{"step": self.metadata.get("provenance", {}).get("steps")}]
        steps = [record.get("step") for record in records]
        return max([self.progress.step, *(step for step in steps if isinstance(step, int))])

    @property
    def max_steps(self) -> int | None:
        train = self.settings.get("train")
        steps = train.get("max_steps") if isinstance(train, Mapping) else None
        return steps if isinstance(steps, int) else None

    @property
    def status(self) -> str:
        """``training``, ``finished`` or ``stopped``."""
        if self.is_running:
            return "training"
        return "finished" if self.metadata and self.step >= (self.max_steps or 0) else "stopped"

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step at the newest throughput; None if the stage is not being trained, or it is not known."""
        session = self.sessions[-1].start.get("run") if self.sessions else None
        if not (self.is_running and self.max_steps and self.samples_per_second and isinstance(session, Mapping)):
            return None
        sizes = [session.get(name, 1) for name in ("batch_size", "accumulate", "devices")]
        return max(0, self.max_steps - self.step) * math.prod(sizes) / self.samples_per_second

    @property
    def monitor(self) -> str:
        """Name of the metric that selects ``best.ckpt``, for readers."""
        metric = TASKS[self.name].monitor
        return MONITORS.get(metric, metric)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best validation of the metric that selects ``best.ckpt``."""
        return self.progress.best

    @property
    def samples_per_second(self) -> float | None:
        """Newest throughput."""
        latest = self.progress.latest
        return latest.get("system/samples_per_second", latest.get("train/images_per_second"))  # of earlier versions


def stage_of(run: Path, name: str, settings: Any = None, progress: Progress | None = None) -> Stage:
    """Return the stage of a run folder that has this name, whether or not there are files of it."""
    task = TASKS[name]
    return Stage(
        name,
        run / name,
        run / task.result,
        settings if isinstance(settings, Mapping) else {},
        progress or Progress(f"val/{task.monitor}", task.higher_is_better),
    )


@dataclass
class Run:
    """Files of a run, read when they are needed.

    Args:
        folder: the run folder.
        progress: progress of each stage from an earlier reading of the run, which is updated.

    Raises:
        TrainingError: the folder does not exist, or holds no stage.
    """

    folder: Path
    progress: dict[str, Progress] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise TrainingError(
                f"{self.folder} is not a folder; name the run folder of a training, such as runs/emoji_64."
            )
        if not self.stages:
            raise TrainingError(
                f"{self.folder} holds nothing of a training (no folder {', '.join(TASKS)} with metrics, images or a result); "
                "name the run folder of a training that has begun."
            )

    @cached_property
    def config_text(self) -> str | None:
        """Text of ``config.yaml``."""
        try:
            return (self.folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Values of ``config.yaml``; empty if it cannot be read."""
        try:
            config = parse(self.config_text or "")
        except (ConfigError, ValueError):
            return {}
        return config if isinstance(config, Mapping) else {}

    @cached_property
    def stages(self) -> list[Stage]:
        """Stages of which there is anything, in the order of training."""
        every = [stage_of(self.folder, name, self.config.get(name), self.progress.get(name)) for name in TASKS]
        for each in every:
            each.progress.update(each.metrics_file)
            self.progress[each.name] = each.progress
        return [each for each in every if each.progress.latest or each.images or each.sessions or each.metadata]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @cached_property
    def selections(self) -> dict[str, Mapping[str, Any]]:
        """Content of ``data.json`` by split: the samples before and after the filters; empty for runs of earlier versions."""
        content = _json(self.folder / DATA_FILE)
        items = content.items() if isinstance(content, dict) else ()
        return {split: each for split, each in items if isinstance(each, dict)}

    @cached_property
    def preparation_reports(self) -> dict[Path, Mapping[str, Any]]:
        """Contents of the ``report.json`` in the folders of the shards, by path."""
        data, found = self.config.get("data") or {}, {}
        for split in ("train", "val", "test"):
            sources = data.get(split)
            for source in sources if isinstance(sources, list) else [sources]:
                for folder in (Path(source), Path(source).parent) if isinstance(source, str) else ():
                    path = folder / "report.json"
                    content = _json(path)
                    if isinstance(content, Mapping):
                        found[path] = content
        return found


def _csv_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; a last one that is incomplete, whose last number may be cut, is left out."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            text = file.read()
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    except (OSError, csv.Error):
        return []


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one in each line; a line that was cut by a kill is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
