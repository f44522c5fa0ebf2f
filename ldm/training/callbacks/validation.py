"""Validation after the steps for which it is due."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

from typing import Any

import lightning as L

from ldm.training.engine import StageModule


class Validation(L.Callback):
    """Validation every ``validate_every`` steps, or at the end if there are fewer steps.

    It runs here, not when Lightning would run it, so that every checkpoint is saved at the same point of Lightning's loop.
    """

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        if module.interrupted:
            module.interrupted = False
            self.run_if_due(trainer, module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.is_optimizer_step(batch_idx):
            self.run_if_due(trainer, module, batch)

    @staticmethod
    def run_if_due(trainer: L.Trainer, module: StageModule, batch: Any = None) -> None:
        """Validate if it is due at the newest step and there are validation data."""
        config = module.train_config
        if module.completed_steps % min(config.validate_every, config.max_steps) or not trainer.enable_validation:
            return
        module.verify(batch)
        loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
        loop.restarting = False
        first_loop_iter = connector._first_loop_iter
        trainer.validating = True
        loop.run()
        trainer.training = True  # the trainer's state and the connector's are restored as Lightning's loop does
        connector._first_loop_iter = first_loop_iter
