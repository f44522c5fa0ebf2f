"""Checkpoints of a training."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L

from ldm.formats.sharded_checkpoint import remove_checkpoint, replace_checkpoint
from ldm.formats.training_checkpoint import earlier_checkpoints, step_of
from ldm.training.engine import StageModule
from ldm.training.resume import ResumePoint


class Checkpoints(L.Callback):
    """Writer of ``last.ckpt`` every ``checkpoint_every`` steps and at the end, and of ``best.ckpt`` after the best validation.

    It follows the other callbacks of a step: a checkpoint is saved when its step has been logged, previewed and validated.
    The ``last.ckpt`` before is kept as ``step_<number>.ckpt``, and so is the last one before the decay of the learning rate, from
    which a longer training can go on. Weights are verified before they replace earlier ones.

    Args:
        start: checkpoint from which training resumes; None for a new training.
    """

    def __init__(self, start: ResumePoint | None = None) -> None:
        self.abandons = start is not None and start.abandons
        self.best = start.best if start else None  # score of best.ckpt
        self.last = (
            start.steps if start and start.path.name == "last.ckpt" else None
        )  # step of last.ckpt, if it is intact
        self.batch: Any = None  # of the newest step

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        if self.abandons and trainer.is_global_zero:
            later = [path for path in earlier_checkpoints(module.folder) if step_of(path) > module.completed_steps]
            best = module.folder / "best.ckpt"
            for path in (*later, *([best] if self.best is None and best.exists() else [])):
                remove_checkpoint(path)

    def on_train_batch_start(self, trainer: L.Trainer, module: StageModule, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.is_optimizer_step(batch_idx) and module.is_due(module.train_config.checkpoint_every):
            self.save(trainer, module, "last.ckpt")

    def on_validation_end(self, trainer: L.Trainer, module: StageModule) -> None:
        score = module.validation.get(module.task.monitor)
        if score is None or not math.isfinite(score) or trainer.state.fn != "fit":
            return
        if self.best is None or ((score > self.best) == module.task.higher_is_better and score != self.best):
            self.best = score
            self.save(trainer, module, "best.ckpt")

    def save(self, trainer: L.Trainer, module: StageModule, name: str) -> None:
        """Verify the weights and save a checkpoint atomically; called on all ranks, written by the first."""
        module.verify(self.batch)
        path = module.folder / name
        unfinished = path.with_suffix(".part")
        trainer.save_checkpoint(unfinished, weights_only=False)
        if trainer.is_global_zero:
            if name == "last.ckpt":
                self._keep_last(path, module)
            replace_checkpoint(unfinished, path)
        trainer.strategy.barrier()

    def _keep_last(self, last: Path, module: StageModule) -> None:
        """Keep the ``last.ckpt`` of an earlier step by another name, and delete the checkpoints that are no longer kept."""
        step = module.completed_steps
        if self.last is not None and self.last < step:
            earlier = last.with_name(f"step_{self.last:07d}.ckpt")
            try:
                earlier.hardlink_to(last)  # last.ckpt is there until the new one replaces it
            except OSError:  # it is a folder of shards, or the file system has no hard links
                last.replace(earlier)
        self.last = step
        kept = [path for path in earlier_checkpoints(last.parent) if step_of(path) < step]
        stable = module.train_config.stable_steps
        before_decay = [] if stable is None or step <= stable else [path for path in kept if step_of(path) <= stable]
        kept = kept[: module.train_config.keep_checkpoints - 1] + before_decay[:1]
        for path in set(earlier_checkpoints(last.parent)) - set(kept):
            remove_checkpoint(path)
