"""The runs of a comparison: ordinary trainings in ``RUN_DIR/ablation/``, each with its config, its result and its receipts.

The name of a run ends with a hash of all that its training depends on, so that runs of another config or number of steps are
never taken for its own. ``ablation-run.json`` in its folder records its state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ldm.ablation import metrics
from ldm.ablation.metrics import Measured
from ldm.config import to_yaml
from ldm.formats.tensors import write_atomically, write_json
from ldm.training.experiment import Experiment
from ldm.training.subruns import digest, with_steps

FOLDER = "ablation"
"""Folder of the comparisons in a run folder."""

CONFIG, RECORD = "experiment.yaml", "ablation-run.json"

State = Literal["open", "trained", "diverged", "finished"]


@dataclass(frozen=True)
class Task:
    """Training and measurements of the run in a folder.

    Attributes:
        recipe: name of the recipe.
        seed: number of the seed, from 0.
        stage: trained stage.
        steps: number of steps.
        repeats: number of seeds of the metrics that are measured several times.
        features: feature networks.
        judges: fingerprints of these, or what names them; a run that was measured with others is measured again.
    """

    recipe: str
    seed: int
    stage: str
    steps: int
    repeats: int
    features: tuple[str, ...]
    judges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """State of a run.

    Attributes:
        task: what is done in it.
        state: ``open``: training; ``trained``: not measured yet; ``diverged``: the loss or the weights were not finite.
        seconds: time of training and measuring, in all sessions.
        numbers: what was measured.
        error: why it diverged.
    """

    task: Task
    state: State = "open"
    seconds: float = 0.0
    numbers: Mapping[str, Measured] = field(default_factory=dict)
    error: str = ""

    @property
    def is_done(self) -> bool:
        """True if nothing is left to do."""
        return self.state in ("finished", "diverged")

    def write(self, folder: Path) -> None:
        """Write the record into the folder of its run."""
        write_json(folder / RECORD, {**asdict(self), "numbers": metrics.to_json(self.numbers)})

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Read the record of a run; None if there is none."""
        try:
            values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        task: Any = {name: tuple(each) if isinstance(each, list) else each for name, each in values["task"].items()}
        return cls(**{**values, "task": Task(**task), "numbers": metrics.from_json(values["numbers"])})


@dataclass(frozen=True)
class Run:
    """A run of a comparison: its experiment, in a folder of its own, and its task."""

    experiment: Experiment
    task: Task

    @property
    def folder(self) -> Path:
        return self.experiment.folder

    @property
    def record(self) -> Record:
        """Its record; one of a task that measures less is not done."""
        found = Record.read(self.folder)
        if found is None:
            return Record(self.task)
        judges = found.task.judges or self.task.judges  # earlier versions did not record them
        if replace(found.task, judges=judges) != self.task and found.state == "finished":
            return replace(found, task=self.task, state="trained")
        return replace(found, task=self.task)

    @property
    def name(self) -> str:
        """Name for lines about it."""
        return f"{self.task.recipe}, seed {self.task.seed}"

    def prepare(self) -> None:
        """Write config and record, from which the process of the run reads what to do."""
        text = to_yaml(self.experiment)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
        self.record.write(self.folder)


def make_run(experiment: Experiment, task: Task) -> Run:
    """Return a run of a recipe's experiment; its seed is that of the experiment plus the number of the seed.

    It trains on one device, writes few previews and validations, and cannot read the test split.
    """
    section = getattr(experiment, task.stage)
    section = replace(section, train=with_steps(section.train, task.steps))
    if task.stage == "denoiser":
        section = replace(section, prompts=(), classes=())
    data: Any = experiment.data
    changes: dict[str, Any] = {
        task.stage: section,
        "data": replace(data, test=None) if hasattr(data, "test") else data,
        "decoder": None,
        "seed": experiment.seed + task.seed,
        "trainer": on_one_device(experiment).trainer,
    }
    own = replace(experiment, **changes)
    slug = re.sub(r"[^\w.+-]+", "_", task.recipe).strip("._") or "recipe"
    name = f"{slug}-seed{task.seed}-{digest(own, task.stage)}"
    return Run(replace(own, name=name, run_dir=str(experiment.folder / FOLDER / name)), task)


def on_one_device(experiment: Experiment) -> Experiment:
    """Return the experiment on one device, without further loggers."""
    trainer = replace(experiment.trainer, devices=1, num_nodes=1, strategy="auto", loggers=())
    return replace(experiment, trainer=trainer)
