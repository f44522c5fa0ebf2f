"""LightningDataModule: the loader of each split, on each rank."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor

from ldm.data.config import DataConfig
from ldm.data.filters import Selection
from ldm.data.latents import cache_latents
from ldm.data.samples import Batch, Samples
from ldm.data.stream import EvaluationLoader, TrainStream
from ldm.data.teacher import Teacher
from ldm.vae import FirstStage

FAR_SMALLER = 3
"""Ratio of the images that a config was made for to those there are, above which a warning is given."""


class Encoded(Protocol):
    """Source of latents, in place of the images or with them."""

    def open(self, split: str, samples: Samples, device: torch.device | str) -> Samples:
        """Return the latents of the images of a split, on whose ``device`` they may be encoded."""

    def complete(self, batch: Batch, device: torch.device) -> Batch:
        """Return a batch, which is on ``device``, as the task takes it."""


@dataclass(frozen=True)
class LatentSource:
    """Source of cached latents: the first stage that encodes the images once if ``cache_latents`` is true.

    Args:
        first_stage: frozen, in evaluation mode.
        fingerprint: fingerprint of its weights.
        folder: folder of the latents, one file per split.
        with_images: True to give the images with their latents.
        teacher: network whose features of the training images are cached and given as well; None for none.
    """

    first_stage: FirstStage
    fingerprint: str
    folder: Path
    with_images: bool = False
    teacher: Teacher | None = None

    def open(self, split: str, samples: Samples, device: torch.device | str) -> Samples:
        """Return the latents of a split, from its file or encoded here."""
        path = self.folder / f"{split}.safetensors"
        teacher = self.teacher if split == "train" else None
        return cache_latents(self.first_stage, self.fingerprint, samples, path, device, self.with_images, teacher)

    def complete(self, batch: Batch, device: torch.device) -> Batch:
        """Return the batch."""
        return batch


class DataModule(L.LightningDataModule):
    """Batches of one stage.

    The training loader is one Lightning epoch that spans the whole run (``Trainer(max_epochs=1)``); Lightning
    keeps its position in the checkpoint and continues from there.

    Args:
        data: the config section.
        batch_size: samples per batch, on each rank.
        seed: seed of order and augmentation.
        total_batches: training batches of the complete run, on each rank.
        start_batch: first batch, if a run is resumed without Lightning's own resume.
        latents: if given, batches contain what determines the posterior (``mean`` and ``std``), instead of ``image`` or with it.
    """

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        seed: int,
        total_batches: int,
        *,
        start_batch: int = 0,
        latents: Encoded | None = None,
    ):
        super().__init__()
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.total_batches, self.start_batch, self.latents = total_batches, start_batch, latents
        self._stored: dict[str, Samples] = {}
        self._opened: dict[str, Samples] = {}

    def prepare_data(self) -> None:
        """Encode on one rank while the others wait; they then read the file."""
        if self.latents is not None:
            for split in ("train", "val") if self.validates else ("train",):
                self.samples(split)

    @property
    def validates(self) -> bool:
        """True if there are validation data."""
        return self.data.has("val")

    def train_dataloader(self) -> TrainStream:
        samples = self.samples("train")
        if self.data.made_for is not None and FAR_SMALLER * len(samples) < self.data.made_for:
            warnings.warn(
                f"there are {len(samples)} training images, but the config was made for about {self.data.made_for} "
                "(data.made_for); see the section 'Few images' of docs/your-own-pictures.md.",
                stacklevel=2,
            )
        if not self.validates:
            warnings.warn(
                "data.val is null, so nothing is validated: there is no best.ckpt, and previews show training images.",
                stacklevel=2,
            )
        return TrainStream(
            samples,
            self.batch_size,
            self.seed,
            self.total_batches,
            start_batch=self.start_batch,
            shuffle_buffer=self.data.shuffle_buffer,
            **self._place(),
        )

    def val_dataloader(self) -> EvaluationLoader:
        return EvaluationLoader(self.samples("val"), self.batch_size, bucketed=True, **self._place())

    def test_dataloader(self) -> EvaluationLoader:
        return EvaluationLoader(self.samples("test"), self.batch_size, bucketed=True, **self._place())

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the tensors, but not lists of captions and keys, each entry of which Lightning would inspect."""
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        return batch if self.latents is None else self.latents.complete(batch, device)

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each split that training reads."""
        return {split: self._images(split).fingerprint for split in ("train", "val")[: 1 + self.validates]}

    def selections(self) -> dict[str, Selection]:
        """Return what the filters dropped of each split that training reads."""
        opened = {split: self._images(split) for split in ("train", "val")[: 1 + self.validates]}
        return {split: images.selection or Selection(len(images)) for split, images in opened.items()}

    def _images(self, split: str) -> Samples:
        if split not in self._stored:
            self._stored[split] = self.data.open(split)
        return self._stored[split]

    def samples(self, split: str) -> Samples:
        """Return the samples of a split, opened once; as latents if a source of latents is given.

        Without validation data, ``val`` is ``train``, for previews.
        """
        split = "train" if split == "val" and not self.validates else split
        if split not in self._opened:
            samples = self._images(split)
            if self.latents is not None:
                device = self.trainer.strategy.root_device if self.trainer is not None else "cpu"
                samples = self.latents.open(split, samples, device)
            self._opened[split] = samples
        return self._opened[split]

    def _place(self) -> dict[str, Any]:
        if self.trainer is None:
            return {}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
