"""Conditioner for edge maps, concatenated to the latent: outlines that the image follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import ConditionerConfig, check_dropout, dropped, training_images
from ldm.conditioning.pixel_map import PixelMapConditioner
from ldm.config import config_field
from ldm.modalities.edges import EDGES, detect_edges
from ldm.nn.conditioning import Conditioning


@dataclass(frozen=True)
class EdgesConditionerConfig(ConditionerConfig, kind="edges"):
    """An edge map; in training read from the data's .edges.png, or else detected in the training image."""

    dropout: float = config_field(
        0.1, "fraction of the training maps that are dropped, for classifier-free guidance", changeable=True
    )
    size: tuple[int, int] | None = config_field(None, "height and width of an absent map; null = size of the latents")
    latent_factor: int | None = config_field(
        None, "downsampling factor of the maps, that of the first stage; null = taken from the experiment"
    )

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    @property
    def input_keys(self) -> tuple[str, ...]:
        return (EDGES.key,)

    @property
    def concat_channels(self) -> int:
        return 1

    def resolved(self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int) -> EdgesConditionerConfig:
        return replace(self, size=self.size or latent_size, latent_factor=self.latent_factor or factor)

    def build(self, tokenizer: Tokenizer | None = None) -> EdgesConditioner:
        return EdgesConditioner(self)


class EdgesConditioner(PixelMapConditioner):
    """Conditioner with one channel ``[b 1 h/f w/f]``: 1 where a latent's pixels contain an edge, -1 elsewhere, 0 for no map."""

    modality = EDGES

    def __init__(self, config: EdgesConditionerConfig):
        super().__init__(config.size, config.latent_factor, absent=0.0)
        self.config = config

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        maps = self.maps(inputs)
        kept = ~dropped(len(maps), self.config.dropout, generator).to(maps.device)
        return Conditioning(concat=(maps * kept[:, None, None])[:, None])

    def prepare_batch(
        self, batch: Mapping[str, Any], encode: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Mapping[str, Any]:
        """Add ``edges [b h w]``, detected in the images, unless the data has edge maps."""
        if EDGES.key in batch:
            return batch
        return {**batch, EDGES.key: detect_edges(training_images(batch, "edges"))}

    def shrunk(self, maps: Tensor) -> Tensor:
        """Downsample edge maps ``[b h w]`` in [0, 1] ``-> [b h/f w/f]`` in [-1, 1], by the maximum in each cell."""
        return 2 * F.max_pool2d(maps[:, None], self.factor)[:, 0] - 1
