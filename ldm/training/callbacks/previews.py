"""Images made during the training."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from ldm.errors import first_line
from ldm.formats.tensors import write_atomically
from ldm.image_output import write_animation
from ldm.training.engine import StageModule
from ldm.training.tasks.task import Preview


class Previews(L.Callback):
    """Writer of the previews of the task, every ``images_every`` steps and at the end.

    Images become PNG files with the step in their name, and those of steps that a resumed training repeats are deleted; only the
    newest animation is kept, as a GIF. If they cannot be made, a
    warning says why, and training goes on.
    """

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        if trainer.is_global_zero:
            for path in (module.folder / "images").glob("*_*.png"):
                step = path.stem.rpartition("_")[2]
                if step.isdecimal() and int(step) > module.completed_steps:
                    path.unlink()
        if module.interrupted:
            self.make_if_due(trainer, module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.is_optimizer_step(batch_idx):
            self.make_if_due(trainer, module, batch)

    def make_if_due(self, trainer: L.Trainer, module: StageModule, batch: Any = None) -> None:
        """Make the images if they are due at the newest step."""
        if not module.is_due(module.train_config.images_every):
            return
        module.verify(batch)
        try:
            previews = module.previews(trainer.datamodule.samples)  # type: ignore[attr-defined]  # set by Lightning
            if trainer.is_global_zero:
                self._write(previews, module.folder / "images", module.completed_steps)
        except Exception as error:  # images are not worth a training
            warnings.warn(
                f"the images of stage {module.stage} at step {module.completed_steps} could not be made ({type(error).__name__}: "
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
                write_atomically(folder / f"{name}_{step:07d}.png", functools.partial(preview.save, format="PNG"))
