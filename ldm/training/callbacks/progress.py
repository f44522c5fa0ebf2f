"""Trial of the settings before the first step, and the progress bar."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L

from ldm.training.engine import StageModule


class Trial(L.Callback):
    """Trial of the settings before the first step; then the first rank calls ``begin``."""

    def __init__(self, begin: Callable[[], object]):
        self.begin = begin

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        module.try_settings()
        if trainer.is_global_zero:
            self.begin()


class Progress(L.Callback):
    """Progress bar with the losses and the remaining time; it counts the steps of the run, not of the session."""

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=module.train_config.max_steps,
            initial=module.completed_steps,
            desc=module.stage,
            unit="step",
            dynamic_ncols=True,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.bar.disable and time.time() - self.bar.last_print_t >= self.bar.mininterval:  # else it is not drawn
            values = {name: f"{float(value):.4g}" for name, value in module.latest.items()}
            self.bar.set_postfix(values, refresh=False)
        self.bar.update(module.completed_steps - self.bar.n)

    def on_train_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: L.Trainer, module: StageModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
