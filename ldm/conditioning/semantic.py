"""Semantic maps: a class for each place, concatenated to the latent (Rombach et al. 2022, arXiv 2112.10752, section 4.3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, check_dropout, dropped
from ldm.config import config_field
from ldm.errors import ConfigError, DataError, SamplingError
from ldm.nn.conditioning import Conditioning


@dataclass(frozen=True)
class SemanticConditionerConfig(ConditionerConfig, kind="semantic"):
    """A map that gives each place a class."""

    classes: int = config_field(help="number of classes; a map holds numbers 0 .. classes - 1")
    embedding: int | None = config_field(
        None, "channels of a learnt embedding of a class; null = one-hot, a channel each"
    )
    dropout: float = config_field(0.1, "share of the training maps that are dropped, for guidance")
    size: tuple[int, int] | None = config_field(None, "height and width of an absent map; null = that of the latents")
    latent_factor: int | None = config_field(
        None, "factor of the first stage, by which maps are made smaller; null = that of the experiment's"
    )

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        if self.classes < 1 or (self.embedding is not None and self.embedding < 1):
            raise ConfigError("classes and embedding must be at least 1.")

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("semantic",)

    @property
    def concat_channels(self) -> int:
        return self.embedding or self.classes

    def resolved(self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int) -> SemanticConditionerConfig:
        return replace(self, size=self.size or latent_size, latent_factor=self.latent_factor or factor)

    def build(self, tokenizer: Tokenizer | None = None) -> SemanticConditioner:
        assert self.size is not None, "the size comes from the experiment's latents"
        assert self.latent_factor is not None, "the factor comes from the experiment's first stage"
        return SemanticConditioner(self, self.size, self.latent_factor)


class SemanticConditioner(Conditioner):
    """A table with one row more than classes: the last, all zeros, stands for no map."""

    def __init__(self, config: SemanticConditionerConfig, size: tuple[int, int], factor: int):
        super().__init__()
        self.config = config
        self.size = size
        self.factor = factor
        self.table = nn.Embedding(config.classes + 1, config.concat_channels, padding_idx=config.classes)
        if config.embedding is None:
            self.table.weight.requires_grad_(False).copy_(torch.eye(config.classes + 1, config.classes))

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        if "semantic" not in inputs:
            raise DataError(
                "the denoiser is conditioned on semantic maps, but the data has none; give each sample a .semantic.png."
            )
        labels = self._labels(inputs["semantic"]).to(self.table.weight.device)
        drop = dropped(len(labels), self.config.dropout, generator).to(labels.device)
        rows = self.table(torch.where(drop[:, None, None], self.config.classes, labels))
        return Conditioning(concat=rows.permute(0, 3, 1, 2))

    def unconditional(self, inputs: Mapping[str, Any], negative: Sequence[str] | None = None) -> Conditioning:
        """No maps, of the size of those that are given."""
        return Conditioning(concat=torch.zeros_like(self(inputs).concat))

    def _labels(self, maps: Tensor | Sequence[Any]) -> Tensor:
        """``[b h w]``; those of absent maps are one past the last class."""
        if isinstance(maps, Tensor):
            return self._shrunk(maps)
        labels = [None if each is None else self._shrunk(_as_map(each)[None]) for each in maps]
        sizes = dict.fromkeys(tuple(each.shape[1:]) for each in labels if each is not None)
        if len(sizes) > 1:
            raise SamplingError(
                f"the semantic maps differ in size ({len(sizes)} sizes); give maps of one size at a time."
            )
        absent = torch.full((1, *next(iter(sizes), self.size)), self.config.classes)
        return torch.cat([absent if each is None else each for each in labels])

    def _shrunk(self, maps: Tensor) -> Tensor:
        """``[b H W]`` of class numbers ``-> [b H/f W/f]``, each the one nearest to the middle of its place."""
        wrong = maps[(maps < 0) | (maps >= self.config.classes)]
        if len(wrong):
            raise SamplingError(
                f"a semantic map holds {int(wrong[0])}, but its classes are 0 to {self.config.classes - 1}."
            )
        size = [side // self.factor for side in maps.shape[-2:]]
        return F.interpolate(maps[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def _as_map(value: Any) -> Tensor:
    """``[h w]`` of whole numbers, of an array, an image of one channel or a list of rows."""
    values = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    if values.ndim != 2 or values.dtype.kind not in "iub":
        raise SamplingError(
            f"a semantic map is [h w] of whole numbers, not {list(values.shape)} of {values.dtype}; give a class a pixel."
        )
    return torch.from_numpy(values.astype(np.int64))
