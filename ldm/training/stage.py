"""The base of the three stages' modules: what each of them does the same way."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import TrainingError
from ldm.training.ema import EMA
from ldm.training.optim import TrainConfig, adamw

Picture = Image.Image | list[Image.Image]
"""An image, or the frames of an animation."""


def seed_of(*key: int | str) -> int:
    """A seed that depends on ``key`` alone."""
    return zlib.crc32("/".join(map(str, key)).encode())


class StageModule(L.LightningModule):
    """One stage of training.

    A subclass gives ``trainable_module()`` (what is trained and averaged), ``training_step``, ``validation_step`` and
    ``pictures``. Steps are counted here (``completed_steps``), since Lightning counts those of all optimizers together.

    Args:
        config: how to train.
        handoff: fingerprints of the predecessors whose weights it begins with, by stage.
        seed: of the experiment; all randomness of a step is drawn from a generator of (seed, stage, step, rank).
        folder: the stage's folder in the run.
    """

    stage: ClassVar[str]
    monitor: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def __init__(self, config: TrainConfig, handoff: Mapping[str, str], seed: int, folder: Path):
        super().__init__()
        self.train_config = config
        self.handoff = dict(handoff)
        self.seed = seed
        self.folder = folder
        self.completed_steps = 0
        self.ema: EMA | None = None
        self.latest: dict[str, Tensor | float] = {}  # metrics of the newest training batch
        self.validation: dict[str, float] = {}  # of the newest validation

    # What a stage is

    def trainable_module(self) -> torch.nn.Module:
        """The module whose trainable parameters are optimized and averaged."""
        raise NotImplementedError

    def compile_networks(self) -> None:
        """torch.compile, in place, what a training step calls."""
        raise NotImplementedError

    def pictures(self) -> Mapping[str, Picture]:
        """Named images that show what the stage has learnt so far; made with the averaged weights."""
        return {}

    @property
    def data(self) -> Any:
        """The data module of the training."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared

    # Randomness

    def generator(self, *key: int | str) -> torch.Generator:
        """A generator that depends on the seed, the stage and ``key`` alone, so that a resumed run draws the same."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.stage, *key))

    def step_generator(self, batch_index: int) -> torch.Generator:
        """The generator of a training batch."""
        return self.generator("train", batch_index, self.global_rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed = seed_of(self.seed, self.stage, "dropout", batch_idx, self.global_rank)
        if self.device.type == "cpu":  # torch.manual_seed takes a millisecond to seed absent devices too
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    # Optimization

    def configure_optimizers(self) -> Any:
        return adamw([self.trainable_module()], self.train_config)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The learning rate of the step at hand. Not a scheduler's: a resumed one would keep that of the old config."""
        rate = self.train_config.learning_rate * self.train_config.learning_rate_factor(self.completed_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_fit_start(self) -> None:
        if self.train_config.ema_decay and self.ema is None:
            self.ema = EMA(self.trainable_module(), self.train_config.ema_decay)
        if self.ema is not None:
            self.ema.to(self.device)

    def after_batch(self, batch_index: int) -> None:
        """Count the step and average the weights, if the optimizer has stepped."""
        if self.is_optimizer_step(batch_index):
            self.completed_steps += 1
            if self.ema is not None:
                self.ema.update()

    def is_optimizer_step(self, batch_index: int) -> bool:
        """Whether the optimizer steps after this batch (gradients are accumulated over ``accumulate`` batches)."""
        return (batch_index + 1) % self.train_config.accumulate == 0

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within the block the networks have their averaged weights."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def report(self, loss: Tensor, **metrics: Tensor | float) -> Tensor:
        """Check the loss of a training batch and hand its metrics to the loggers; returns the loss.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            last = self.folder / "last.ckpt"
            good = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
            raise TrainingError(
                f"the loss of stage {self.stage} is {value} at step {self.completed_steps}; {good}. "
                f"Resume it with a lower {self.stage}.train.learning_rate or in another trainer.precision."
            )
        self.latest = {"loss": value, **metrics}
        return loss

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["completed_steps"] = self.completed_steps
        checkpoint["handoff"] = self.handoff
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.completed_steps = checkpoint["completed_steps"]
        if "ema" in checkpoint:
            self.ema = EMA(self.trainable_module(), self.train_config.ema_decay)
            self.ema.load_state_dict(checkpoint["ema"])
        # A run that had ended goes on if the config asks for more steps now; Lightning would take its end for the stream's.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = self.completed_steps >= self.train_config.max_steps
