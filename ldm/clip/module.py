"""Stage 2: training of the CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig, clip_loss
from ldm.clip.retrieval import recall_at_k
from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.image_output import Images
from ldm.training.optim import TrainConfig
from ldm.training.stage import StageModule

PREVIEW = 8
"""Captions that are shown with the images they find."""


@dataclass(frozen=True)
class CLIPStage:
    """Stage 2: tokenizer and CLIP, how they are trained, or the file that they come from."""

    tokenizer: TokenizerConfig = config_field(help="captions to tokens")
    model: CLIPConfig = config_field(help="text and image tower")
    train: TrainConfig | None = config_field(None, "its training; null = it is not trained here")
    checkpoint: str | None = config_field(
        None, "source of a CLIP or a text encoder that is only used: a file, a folder or a hub id, of SD or of CLIP"
    )

    def __post_init__(self) -> None:
        if self.train is not None and self.model.image is None:
            raise ConfigError(
                "model.image is missing, and a CLIP is trained with both towers; give it, or set train to null."
            )


class CLIPModule(StageModule):
    """Pictures and captions of a batch against each other; all devices' batches count as one."""

    stage = "clip"
    monitor = "text_to_image_R@1"
    higher_is_better = True

    def __init__(self, config: CLIPStage, train: TrainConfig, seed: int, folder: Path, tokenizer: Tokenizer):
        super().__init__(train, {}, seed, folder)
        self.config = config
        self.tokenizer = tokenizer
        self.clip = config.model.build()

    def trainable_module(self) -> nn.Module:
        return self.clip

    def compile_networks(self) -> None:
        self.clip.compile()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        tokens = self.tokenizer(batch["text"], longest=True).to(self.device)
        image, text, scale = self.clip(batch["image"], tokens)
        loss = clip_loss(image, text, scale, self.global_rank, self.trainer.world_size)
        return self.report(loss, logit_scale=self.clip.logit_scale.detach().exp())

    def after_batch(self, batch_index: int) -> None:
        self.clip.clamp_logit_scale()
        super().after_batch(batch_index)

    # Validation: retrieval over the whole split

    def on_validation_epoch_start(self) -> None:
        self._texts: list[Tensor] = []
        self._images: list[Tensor] = []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._texts.append(self.clip.encode_text(self.tokenizer(batch["text"], longest=True).to(self.device)))
        self._images.append(self.clip.encode_image(batch["image"]))

    def on_validation_epoch_end(self) -> None:
        text, image = self._gathered(self._texts), self._gathered(self._images)
        self.validation = recall_at_k(text, image)

    def _gathered(self, features: list[Tensor]) -> Tensor:
        """Features of all ranks; ranks may hold one row more or less, the order is the same for text and image."""
        rows = torch.cat(features)
        if self.trainer.world_size == 1:
            return rows
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, rows.cpu())
        return torch.cat(parts)

    def pictures(self) -> Mapping[str, Any]:
        """Captions of the validation split, each with the three images that come nearest."""
        batch = next(iter(self.data.val_dataloader()))
        text = self.clip.encode_text(self.tokenizer(batch["text"], longest=True).to(self.device))
        image = self.clip.encode_image(batch["image"].to(self.device))
        nearest = (text[:PREVIEW] @ image.T).topk(min(3, len(image)), dim=1).indices.cpu()
        found = (batch["image"][nearest.flatten()] + 1) / 2
        pictures = Images.of(found)
        captions = [caption for caption in batch["text"][:PREVIEW] for _ in range(nearest.shape[1])]
        return {"nearest": pictures.grid(columns=nearest.shape[1], captions=captions)}
