"""Trains a stage and logs the keys of each batch, in a file for each rank: ``logged.py KEYS STAGE CONFIG [OVERRIDE ...]``.

Lightning starts the other ranks with the same command.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L

sys.path.insert(0, str(Path(__file__).parents[2]))

from ldm.training.engine import StageModule
from ldm.training.experiment import load_config
from ldm.training.stages import train_stage


class Keys(L.Callback):
    """Log of the keys of each batch: a line with the index of the batch and the keys; ``<path>.<rank>`` beyond the first rank."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        path = self.path.with_name(f"{self.path.name}.{trainer.global_rank}") if trainer.global_rank else self.path
        with path.open("a") as file:
            file.write(f"{batch_idx} {' '.join(batch['key'])}\n")


def log_keys(path: Path) -> None:
    """Log the keys of all trainings of this process."""
    StageModule.configure_callbacks = lambda module: [Keys(path)]  # type: ignore[assignment]


def read_keys(path: Path) -> list[tuple[int, str]]:
    """The complete lines of a log."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [(int(index), keys) for index, _, keys in (line.partition(" ") for line in lines)]


if __name__ == "__main__":
    keys, stage, config, *overrides = sys.argv[1:]
    log_keys(Path(keys))
    train_stage(load_config(config, overrides), stage)
