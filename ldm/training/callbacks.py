"""Callbacks around the training steps of any stage: logging, images, checkpoints, a graceful stop."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from ldm.errors import CheckpointError, TrainingError, first_line
from ldm.image_output import write_animation
from ldm.training.engine import StageModule
from ldm.training.metrics import MetricsFile
from ldm.training.resume import read_checkpoint
from ldm.training.tasks.task import Preview


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
        self.bar.set_postfix({name: f"{float(value):.4g}" for name, value in module.latest.items()}, refresh=False)
        self.bar.update(module.completed_steps - self.bar.n)

    def on_train_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: L.Trainer, module: StageModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


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


class Previews(L.Callback):
    """Writer of the previews of the task, every ``images_every`` steps and at the end.

    Images become PNG files with the step in their name; only the newest animation is kept, as a GIF. If they cannot be made, a
    warning says why, and training goes on.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, config = module.completed_steps, module.train_config
        due = step % config.images_every == 0 or step == config.max_steps
        if not (module.is_optimizer_step(batch_idx) and due):
            return
        try:
            previews = module.previews(trainer.datamodule.samples)  # type: ignore[attr-defined]  # set by Lightning
            if trainer.is_global_zero:
                self._write(previews, module.folder / "images", step)
        except Exception as error:  # images are not worth a training
            warnings.warn(
                f"the images of stage {module.stage} at step {step} could not be made ({type(error).__name__}: "
                f"{first_line(error)}); the training goes on.",
                stacklevel=2,
            )

    @staticmethod
    def _write(previews: Mapping[str, Preview], folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, preview in previews.items():
            if isinstance(preview, list):
                write_animation(preview, folder / f"{name}.gif")
            else:
                preview.save(folder / f"{name}_{step:07d}.png")


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
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
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
