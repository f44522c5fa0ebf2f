"""Conditioner for image prompts: an image's content, encoded by the image tower, as the context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip.image import ImageTowerConfig, to_size
from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, check_dropout, dropped
from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.nn.conditioning import Conditioning


@dataclass(frozen=True)
class ImageConditionerConfig(ConditionerConfig, kind="image"):
    """An image prompt, encoded by the image tower of stage 2 or by its own; in training, the training image itself."""

    dropout: float = config_field(
        0.1, "fraction of the training images that are dropped, for classifier-free guidance", changeable=True
    )
    trainable: bool = config_field(False, "train the tower with the denoiser; required for a tower of its own")
    tokens: bool = config_field(
        False, "use the hidden states of all patches as context, instead of the embedding as one token"
    )
    pooled: bool = config_field(False, "also give the embedding to the denoiser, as its conditioning vector")
    tower: ImageTowerConfig | None = config_field(
        None, "the image tower; null = taken from the experiment's clip section"
    )
    embed_dim: int | None = config_field(None, "width of the embedding; null = taken from the clip section")

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("image",)

    @property
    def context_width(self) -> int | None:
        return (self.tower.width if self.tower else None) if self.tokens else self.embed_dim

    @property
    def vector_width(self) -> int | None:
        return self.embed_dim if self.pooled else None

    def resolved(self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int) -> ImageConditionerConfig:
        if clip is None or clip.image is None:
            if self.tower is None or self.embed_dim is None or not self.trainable:
                raise ConfigError(
                    "denoiser.conditioner takes images, but there is no clip section that defines its tower; "
                    "add one, or set tower, embed_dim and trainable: true for one of its own."
                )
            return self
        if self.tower not in (None, clip.image) or self.embed_dim not in (None, clip.embed_dim):
            raise ConfigError(
                "denoiser.conditioner has an image tower that differs from that of clip.model; remove tower and embed_dim."
            )
        return replace(self, tower=clip.image, embed_dim=clip.embed_dim)

    def build(self, tokenizer: Tokenizer | None = None) -> ImageConditioner:
        assert self.tower is not None, "the tower comes from the clip section"
        assert self.embed_dim is not None, "the width comes from the clip section"
        return ImageConditioner(self, self.tower, self.embed_dim)


class ImageConditioner(Conditioner):
    """Image tower whose output is zeros for a dropped image, as in Ramesh et al. 2022 (arXiv 2204.06125, section 2.1)."""

    def __init__(self, config: ImageConditionerConfig, tower: ImageTowerConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.size = tower.image_size
        self.width = embed_dim
        self.tower = tower.build(embed_dim).requires_grad_(config.trainable)

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        """Compute the conditioning; the embedding has unit variance per channel on average, like other contexts."""
        given = inputs["image"]
        weight = next(self.tower.parameters())
        blank = torch.zeros(1, 3, self.size, self.size, dtype=torch.float32, device="cpu")
        images = [given] if isinstance(given, Tensor) else [blank if each is None else each[None] for each in given]
        stacked = torch.cat([to_size(each.to(weight.device), self.size) for each in images])
        absent = torch.tensor([each is None for each in given], device="cpu")
        kept = ~(absent | dropped(len(absent), self.config.dropout, generator)).to(weight.device)
        states, embedding = self.tower(stacked.to(weight.dtype))
        embedding = F.normalize(embedding, dim=-1) * self.width**0.5
        context = states[:, 1:] if self.config.tokens else embedding[:, None]
        return Conditioning(
            context=context * kept[:, None, None],
            vector=embedding * kept[:, None] if self.config.pooled else None,
        )

    def pretrained_encoders(self) -> Iterator[tuple[str, nn.Module]]:
        yield "image_encoder", self.tower
