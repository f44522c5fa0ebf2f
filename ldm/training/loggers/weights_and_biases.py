"""Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from ldm.config import config_field
from ldm.errors import ConfigError, TrainingError, first_line
from ldm.formats.tensors import write_atomically
from ldm.training.loggers.logger import LoggedRun, LoggerConfig


@dataclass(frozen=True)
class WandbConfig(LoggerConfig, kind="wandb"):
    """Weights & Biases, one run for each stage; the environment variable WANDB_MODE=offline keeps it on this machine."""

    project: str = config_field(help="project of Weights & Biases")
    entity: str | None = config_field(None, "user or team that owns the project; null = the default of the account")

    def check(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("trainer.loggers has the kind wandb, which is not installed; pip install 'ldm[wandb]'.")

    def open(self, run: LoggedRun) -> Wandb:
        return Wandb(self, run)


class Wandb:
    """Logger of a :class:`WandbConfig`; all sessions of a stage are one run, whose id is in ``wandb.id`` of the stage.

    Steps that a resumed session repeats replace those logged before, since ``step`` is the axis of every chart.

    Raises:
        TrainingError: Weights & Biases cannot be used, for example because nobody is logged in.
    """

    def __init__(self, config: WandbConfig, run: LoggedRun):
        import wandb

        path = run.folder / "wandb.id"
        if run.step == 0 or not path.is_file():
            write_atomically(path, lambda temporary: temporary.write_text(uuid.uuid4().hex[:12], encoding="utf-8"))
        try:
            self.run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=f"{run.folder.parent.name}/{run.stage}",
                group=run.folder.parent.name,
                job_type=run.stage,
                id=path.read_text(encoding="utf-8"),
                resume="allow",
                dir=run.folder,
                config=dict(run.settings),
            )
        except wandb.errors.Error as error:
            raise TrainingError(
                f"Weights & Biases cannot be used ({first_line(error)}); log in with `wandb login`, set WANDB_MODE=offline, or "
                "remove it from trainer.loggers."
            ) from None
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.run.log({"step": step, **row})

    def close(self) -> None:
        self.run.finish()
