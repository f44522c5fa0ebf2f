"""Record of the bad samples that a training reads: their file, their number in checkpoints, and the limit on it."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from ldm.data.bad_samples import BAD, BAD_SAMPLES_FILE, BadSample, BadSamplesFile, summary
from ldm.errors import TrainingError, warn
from ldm.training.engine import StageModule

MIN_SAMPLES = 1000
"""Number of samples, or the size of a smaller training set, below which the fraction of bad ones is not judged."""


class BadSamples(L.Callback):
    """Writer of ``bad_samples.csv``, which stops a training with too many bad samples.

    Each rank receives the bad samples of its batches with them; they are exchanged every ``log_every`` steps, after a validation
    and before a checkpoint, so that all ranks count the same, and are written by the first.
    """

    def __init__(self) -> None:
        self.file = BadSamplesFile()
        self.seen = 0  # training samples used so far, on all ranks
        self.new: dict[str, list[tuple[int, BadSample]]] = {"train": [], "val": []}  # of this rank, with their steps

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        if trainer.is_global_zero:
            self.file.path = module.folder / BAD_SAMPLES_FILE
        splits = ("train", "val")[: 1 + data.validates]
        self.file.start({split: data.samples(split).dropped for split in splits})
        self.limit, self.size = data.data.max_bad_fraction, len(data.samples("train"))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        self.new["train"] += [(module.completed_steps, bad) for bad in batch.get(BAD, ())]
        self.seen += len(batch["key"]) * trainer.world_size
        due = module.is_optimizer_step(batch_idx) and module.completed_steps % module.train_config.log_every == 0
        if due or trainer.world_size == 1:
            self._exchange(trainer, module)
            self._check(module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        self.new["val"] += [(module.completed_steps, bad) for bad in batch.get(BAD, ())]

    def on_validation_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self._exchange(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: StageModule, checkpoint: dict[str, Any]) -> None:
        self._exchange(trainer, module)
        checkpoint["bad_samples"] = {"seen": self.seen, **self.file.state_dict()}

    def on_load_checkpoint(self, trainer: L.Trainer, module: StageModule, checkpoint: dict[str, Any]) -> None:
        if "bad_samples" in checkpoint:  # earlier versions have none
            self.seen = checkpoint["bad_samples"]["seen"]
            self.file.load_state_dict(checkpoint["bad_samples"])

    def _exchange(self, trainer: L.Trainer, module: StageModule) -> None:
        """List the new bad samples of all ranks; called on all ranks."""
        parts: list[Any] = [self.new]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, self.new)
        self.new = {"train": [], "val": []}
        for split in self.new:
            first = not self.file.counts(split)
            found = sorted((each for part in parts for each in part[split]), key=lambda each: each[1].position or 0)
            added = [bad for step, bad in found if self.file.add(step, split, bad)]
            if added and first and trainer.is_global_zero:
                self._warn(module, split, added[0])

    def _warn(self, module: StageModule, split: str, bad: BadSample) -> None:
        instead = "replaced by another" if split == "train" else "left out"
        warn(
            f"the sample {bad.where} of data.{split} cannot be used and is {instead}, since {bad.detail}; such "
            f"samples are listed in {module.folder / BAD_SAMPLES_FILE}."
        )

    def _check(self, module: StageModule) -> None:
        """Raise a TrainingError if there are more bad samples than ``data.max_bad_fraction`` allows; a single one is allowed."""
        counts = self.file.counts("train")
        number, seen = sum(counts.values()), min(self.seen, self.size)
        if number > max(1, self.limit * max(seen, min(self.size, MIN_SAMPLES))):
            raise TrainingError(
                f"{number} of the {max(seen, number)} training samples that stage {module.stage} has read by step "
                f"{module.completed_steps} cannot be used ({summary(counts)}), more than data.max_bad_fraction ({self.limit:g}) "
                f"allows; they are listed in {module.folder / BAD_SAMPLES_FILE}: repair or remove them, or raise "
                "data.max_bad_fraction, and run the same command to resume."
            )
