"""Checkpoints of a training, and a graceful stop."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from ldm.errors import CheckpointError, TrainingError
from ldm.training.engine import StageModule
from ldm.training.resume import read_checkpoint


class Checkpoints(L.Callback):
    """Writer of ``last.ckpt`` every ``checkpoint_every`` steps and when stopped, and of ``best.ckpt`` after the best validation.

    Weights are verified before they replace those of an earlier step. The first Ctrl-C (or SIGTERM) finishes the step, saves and
    stops (:class:`Stop`); a second one stops immediately.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self.batch: Any = None  # of the newest step
        self.stopping = False  # on this rank
        self.stopped = False  # on all ranks
        self.handlers: dict[int, Any] = {}  # handlers from before the training

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        def stop(number: int, frame: Any) -> None:
            self.stopping = True
            self._restore_handlers()

        best = module.folder / "best.ckpt"
        if module.completed_steps and best.is_file():  # last.ckpt is older than the validation of its step
            self.best = self._score(best, module)
        self.handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.is_optimizer_step(batch_idx):
            return
        step, config = module.completed_steps, module.train_config
        self.batch = batch
        self.stopped = bool(trainer.strategy.reduce_boolean_decision(self.stopping, all=False))
        if self.stopped or step % config.checkpoint_every == 0 or step == config.max_steps:
            self.save(trainer, module, "last.ckpt")

    def on_validation_end(self, trainer: L.Trainer, module: StageModule) -> None:
        score = module.validation.get(module.task.monitor)
        if score is None or not math.isfinite(score) or trainer.state.fn != "fit":
            return
        if self.best is None or ((score > self.best) == module.task.higher_is_better and score != self.best):
            self.best = score
            self.save(trainer, module, "best.ckpt")

    def on_train_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _score(self, best: Path, module: StageModule) -> float | None:
        """Return the score of a best checkpoint; None if it is of other validation data or, with a warning, cannot be read."""
        try:
            checkpoint = read_checkpoint(best, "the next validation writes it again")
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)
            return None
        same = checkpoint.get("samples", module.fingerprints).get("val") == module.fingerprints.get("val")
        score: float | None = checkpoint["callbacks"][self.state_key]["best"] if same else None
        return score

    def save(self, trainer: L.Trainer, module: StageModule, name: str) -> None:
        """Verify the weights and save a checkpoint atomically; called on all ranks, written by the first."""
        module.verify(self.batch)
        path = module.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        trainer.save_checkpoint(unfinished, weights_only=False)
        if trainer.is_global_zero:
            if unfinished.is_file():
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
            if path.is_dir():
                import shutil
                shutil.rmtree(path)
            unfinished.replace(path)


class Stop(L.Callback):
    """End of a training whose ``checkpoints`` were stopped; the last callback, since it raises."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = module.completed_steps, module.train_config.max_steps
        if self.checkpoints.stopped and step < last:  # raised: Lightning's own stop would first validate
            raise TrainingError(
                f"stage {module.stage} was stopped after step {step} of {last}; run the same command to resume it."
            )
