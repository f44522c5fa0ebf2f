"""Logging of the metrics of training and validation."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

import time
from typing import Any

import lightning as L

from ldm.training.engine import StageModule
from ldm.training.metrics import MetricsFile


class Metrics(L.Callback):
    """Writer of the training metrics every ``log_every`` steps, and of each validation, to ``metrics.csv`` and TensorBoard.

    Checkpoints hold the sums since the last row, and the number of rows: a resumed training writes the rows of one that
    was never interrupted.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}  # sum and number of the values since the last row
        self.rows: int | None = None  # rows at the checkpoint from which training resumes
        self.file: MetricsFile | None = None  # on the first rank

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "rows": self.file.sync() if self.file else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sums, self.rows = dict(state_dict["sums"]), state_dict["rows"]

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        self.last = (time.perf_counter(), module.completed_steps)
        if trainer.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.file = MetricsFile(module.folder / "metrics.csv", module.completed_steps, self.rows)
            self.board = SummaryWriter(str(module.folder / "tensorboard"), purge_step=module.completed_steps + 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in module.latest.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + float(value), count + 1)
        if not (module.is_optimizer_step(batch_idx) and module.is_due(module.train_config.log_every)):
            return
        step = module.completed_steps
        row = {f"train/{name}": total / count for name, (total, count) in self.sums.items()}
        now, (then, since) = time.perf_counter(), self.last
        images = module.train_config.batch_size * module.train_config.accumulate * trainer.world_size
        row["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        row["train/images_per_second"] = images * (step - since) / max(now - then, 1e-9)
        self.sums, self.last = {}, (now, step)
        self.write(step, row)

    def on_validation_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self.write(module.completed_steps, {f"val/{name}": value for name, value in module.validation.items()})
        self.last = (time.perf_counter(), module.completed_steps)

    def write(self, step: int, row: dict[str, float]) -> None:
        """Write a row; other ranks than the first write nothing."""
        if self.file is not None:
            self.file.write(step, row)
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
