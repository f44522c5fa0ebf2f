"""Snapshots of averaged weights during the training."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

from typing import Any

import lightning as L

from ldm.formats.ema_snapshots import snapshots, write_snapshot
from ldm.formats.training_checkpoint import step_of
from ldm.training.engine import StageModule
from ldm.training.sharded_tensors import gathered


class EMASnapshots(L.Callback):
    """Writer of the averages of ``train.ema_snapshots``; those of steps that a resumed training repeats are deleted."""

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        if trainer.is_global_zero:
            for path in snapshots(module.folder):
                if step_of(path) > module.completed_steps:
                    path.unlink()
        if module.interrupted:
            self.write_if_due(trainer, module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.is_optimizer_step(batch_idx):
            self.write_if_due(trainer, module)

    @staticmethod
    def write_if_due(trainer: L.Trainer, module: StageModule) -> None:
        """Write the averages if they are due at the newest step; called on all ranks, written by the first."""
        config = module.train_config.ema_snapshots
        if config is None or not module.is_due(config.every):
            return
        averages = {each.length: gathered(each.average, keep=trainer.is_global_zero) for each in module.power_averages}
        if trainer.is_global_zero:
            write_snapshot(module.folder, module.completed_steps, averages)
