"""Record of the sessions of a training: when each began and ended, at which steps, and in which environment."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from typing import Any

import lightning as L
import torch

from ldm.errors import first_line
from ldm.training.config import TrainerConfig
from ldm.training.engine import StageModule
from ldm.training.environment import SESSIONS, environment


class Sessions(L.Callback):
    """Writer of the start and the end of each session to ``sessions.jsonl``."""

    def __init__(self, config: TrainerConfig):
        self.config = config
        self.started = False

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        run = {
            "max_steps": module.train_config.max_steps,
            "precision": self.config.precision_of(module.train_config),
            "strategy": self.config.strategy,
            "devices": trainer.world_size,
            "compile": self.config.compile,
            "threads": torch.get_num_threads(),
            "batch_size": module.train_config.batch_size,
            "accumulate": module.train_config.accumulate,
        }
        self.started = True
        self._write(trainer, module, "start", run=run, environment=environment(module.device))

    def on_train_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self._write(trainer, module, "end", reason="finished")

    def on_exception(self, trainer: L.Trainer, module: StageModule, exception: BaseException) -> None:
        if self.started:
            self._write(trainer, module, "end", reason=first_line(exception) or type(exception).__name__)

    @staticmethod
    def _write(trainer: L.Trainer, module: StageModule, event: str, **values: Any) -> None:
        if not trainer.is_global_zero:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"event": event, "time": now, "pid": os.getpid(), "step": module.completed_steps, **values})
        path = module.folder / SESSIONS
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
