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
    """Writer of the training metrics every ``log_every`` steps, and of each validation, to ``metrics.csv`` and TensorBoard."""

    def on_fit_start(self, trainer: L.Trainer, module: StageModule) -> None:
        self.sums: dict[str, list[float]] = {}

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        self.last = (time.perf_counter(), module.completed_steps)
        if trainer.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.file = MetricsFile(module.folder / "metrics.csv", module.completed_steps)
            self.board = SummaryWriter(str(module.folder / "tensorboard"), purge_step=module.completed_steps + 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in module.latest.items():
            self.sums.setdefault(name, []).append(float(value))
        step = module.completed_steps
        if not module.is_optimizer_step(batch_idx) or (
            step % module.train_config.log_every and step != module.train_config.max_steps
        ):
            return
        row = {f"train/{name}": sum(values) / len(values) for name, values in self.sums.items()}
        now, (then, since) = time.perf_counter(), self.last
        images = module.train_config.batch_size * module.train_config.accumulate * trainer.world_size
        row["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        row["train/images_per_second"] = images * (step - since) / max(now - then, 1e-9)
        self.sums, self.last = {}, (now, step)
        self.write(trainer, step, row)

    def on_validation_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self.write(
            trainer,
            module.completed_steps,
            {f"val/{name}": value for name, value in module.validation.items()},
        )
        self.last = (time.perf_counter(), module.completed_steps)

    def write(self, trainer: L.Trainer, step: int, row: dict[str, float]) -> None:
        if trainer.is_global_zero and hasattr(self, "file"):
            self.file.write(step, row)
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
