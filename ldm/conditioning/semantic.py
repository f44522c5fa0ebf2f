"""Conditioner for semantic maps, one-hot or embedded, which are concatenated to the latent.

Rombach et al. 2022 (arXiv 2112.10752), section 4.3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import ConditionerConfig, check_dropout, dropped
from ldm.conditioning.pixel_map import PixelMapConditioner
from ldm.config import config_field
from ldm.errors import ConditionError, ConfigError
from ldm.modalities.semantic import SEMANTIC
from ldm.nn.conditioning import Conditioning


@dataclass(frozen=True)
class SemanticConditionerConfig(ConditionerConfig, kind="semantic"):
    """A map with a class number for each pixel."""

    classes: int = config_field(help="number of classes; a map holds numbers 0 .. classes - 1")
    embedding: int | None = config_field(
        None, "channels of a learned class embedding; null = one-hot, one channel per class"
    )
    dropout: float = config_field(
        0.1, "fraction of the training maps that are dropped, for classifier-free guidance", changeable=True
    )
    size: tuple[int, int] | None = config_field(None, "height and width of an absent map; null = size of the latents")
    latent_factor: int | None = config_field(
        None, "downsampling factor of the maps, that of the first stage; null = taken from the experiment"
    )

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        if self.classes < 1 or (self.embedding is not None and self.embedding < 1):
            raise ConfigError("classes and embedding must be at least 1.")

    @property
    def input_keys(self) -> tuple[str, ...]:
        return (SEMANTIC.key,)

    @property
    def concat_channels(self) -> int:
        return self.embedding or self.classes

    def resolved(self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int) -> SemanticConditionerConfig:
        return replace(self, size=self.size or latent_size, latent_factor=self.latent_factor or factor)

    def build(self, tokenizer: Tokenizer | None = None) -> SemanticConditioner:
        return SemanticConditioner(self)


class SemanticConditioner(PixelMapConditioner):
    """Embedding table with one row more than there are classes: the last, all zeros, is for an absent map."""

    modality = SEMANTIC

    def __init__(self, config: SemanticConditionerConfig):
        super().__init__(config.size, config.latent_factor, absent=config.classes)
        self.config = config
        self.table = nn.Embedding(config.classes + 1, config.concat_channels, padding_idx=config.classes)
        if config.embedding is None:
            self.table.weight.requires_grad_(False).copy_(torch.eye(config.classes + 1, config.classes))

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        labels = self.maps(inputs).to(self.table.weight.device)
        drop = dropped(len(labels), self.config.dropout, generator).to(labels.device)
        rows = self.table(torch.where(drop[:, None, None], self.config.classes, labels))
        return Conditioning(concat=rows.permute(0, 3, 1, 2))

    def check(self, maps: Tensor, first: int = 0) -> None:
        wrong = (maps < 0) | (maps >= self.config.classes)
        if wrong.any():
            row = int(wrong.flatten(1).any(1).nonzero()[0])
            value = int(maps[row][wrong[row]][0])
            raise ConditionError.of(
                first + row,
                f"has a semantic map with the value {value}, but the classes are 0 to {self.config.classes - 1}",
            )

    def shrunk(self, maps: Tensor) -> Tensor:
        """Downsample class numbers ``[b h w] -> [b h/f w/f]``, taking the pixel nearest to the centre of each cell."""
        size = [side // self.factor for side in maps.shape[-2:]]
        return F.interpolate(maps[:, None].float(), size, mode="nearest-exact")[:, 0].long()
