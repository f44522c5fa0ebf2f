"""A stop on request: Ctrl-C, and the signals by which queues announce the end of a job."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

import signal
from typing import Any

import lightning as L

from ldm.errors import Interrupted, TrainingError
from ldm.processes import STOP_SIGNALS, set_handlers
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.engine import StageModule


class Interruption(L.Callback):
    """End of a training upon a signal: all ranks finish the step, save a checkpoint and raise.

    Previews and validation of the step are left to the resumed training. A signal to any rank stops all of them. A second
    Ctrl-C stops immediately; repeated other signals change nothing.

    Args:
        checkpoints: saves the checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.received: signal.Signals | None = None  # on this rank
        self.handlers: dict[signal.Signals, Any] = {}  # handlers from before the training

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        def stop(number: int, frame: Any) -> None:
            self.received = signal.Signals(number)
            if number == signal.SIGINT:
                signal.signal(number, self.handlers[signal.SIGINT])

        self.handlers = set_handlers(dict.fromkeys(STOP_SIGNALS, stop))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.is_optimizer_step(batch_idx) and self._agreed(trainer):
            self._stop(trainer, module)

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: StageModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._agreed(trainer):
            module.end_averaging()
            self._stop(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: StageModule) -> None:
        set_handlers(self.handlers)

    def on_exception(self, trainer: L.Trainer, module: StageModule, exception: BaseException) -> None:
        set_handlers(self.handlers)

    def _agreed(self, trainer: L.Trainer) -> bool:
        return bool(trainer.strategy.reduce_boolean_decision(self.received is not None, all=False))

    def _stop(self, trainer: L.Trainer, module: StageModule) -> None:
        """Save and raise: Lightning's own stop would first validate."""
        module.interrupted = True
        self.checkpoints.save(trainer, module, "last.ckpt")
        if (
            not trainer.is_global_zero
        ):  # upon an error here, Lightning would kill the first rank before it reports the stop
            raise SystemExit(0)
        step = f"after step {module.completed_steps} of {module.train_config.max_steps}"
        resume = "run the same command to resume it"
        if self.received == signal.SIGINT:
            raise TrainingError(f"stage {module.stage} was stopped {step}; {resume}.")
        by = self.received.name if self.received else "a signal to another process"
        raise Interrupted(f"stage {module.stage} was stopped by {by} {step}; {resume}.")
