"""Conditioner for captions: the text tower's hidden states as context, optionally its pooled state as the vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig
from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning import long_prompts
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, check_dropout, texts
from ldm.conditioning.text_states import TextEncoder
from ldm.config import config_field, to_dict
from ldm.errors import ConfigError
from ldm.nn.conditioning import Conditioning


@dataclass(frozen=True)
class TextConditionerConfig(ConditionerConfig, kind="text"):
    """A caption, encoded by the text tower of stage 2; a dropped caption is the encoded empty string."""

    dropout: float = config_field(
        0.1, "fraction of the training captions that are dropped, for classifier-free guidance", changeable=True
    )
    trainable: bool = config_field(
        False, "train the tower together with the denoiser (as in the LDM paper), from stage 2's weights"
    )
    pooled: bool = config_field(False, "also give the pooled state to the denoiser, as its conditioning vector")
    tower: TextTowerConfig | None = config_field(
        None, "the text tower; null = taken from the experiment's clip section"
    )

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("text",)

    @property
    def context_width(self) -> int | None:
        return self.tower.width if self.tower else None

    @property
    def vector_width(self) -> int | None:
        return (self.tower.embed_dim or self.tower.width) if self.tower and self.pooled else None

    def resolved(self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int) -> TextConditionerConfig:
        if clip is None:
            raise ConfigError("denoiser.conditioner takes text, but there is no clip section that defines its tower.")
        return replace(self, tower=self.tower or replace(clip.text, embed_dim=clip.embed_dim))

    def with_encoders(self, configs: Mapping[str, Any]) -> TextConditionerConfig:
        return replace(self, tower=configs.get("text_encoder", self.tower))

    def build(self, tokenizer: Tokenizer | None = None) -> TextConditioner:
        assert self.tower is not None, "the tower comes from the clip section"
        assert tokenizer is not None, "a text conditioner needs a tokenizer"
        long_prompts.check_vocabulary(tokenizer, self.tower)
        return TextConditioner(self, self.tower, tokenizer)


class TextConditioner(Conditioner):
    """Tokenizer and text tower. Strings are truncated to the tower's length, except a :class:`ldm.prompts.WeightedPrompt`."""

    def __init__(self, config: TextConditionerConfig, tower: TextTowerConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.tower = tower.build().requires_grad_(config.trainable)

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        states = self.text_states(inputs, texts(inputs, self.config.dropout, generator))
        return Conditioning(context=states["context"], mask=states.get("mask"), vector=states.get("pooled"))

    def text_encoders(self) -> Iterator[TextEncoder]:
        if not self.config.trainable:
            yield TextEncoder("text_encoder", self.tower, to_dict(self.tower.config), self.tokenizer.to_json())

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        with nullcontext() if self.config.trainable else torch.no_grad():
            (context, pooled), mask = long_prompts.read(texts, self.tokenizer, self.tower)
        states = {"context": context} if mask is None else {"context": context, "mask": mask}
        return states | ({"pooled": pooled} if self.config.pooled else {})

    def set_vocabulary(self, config: TextConditionerConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer

    def fits(self, text: str) -> bool:
        return len(self.tokenizer.windows(text)[0]) == 1

    def pretrained_encoders(self) -> Iterator[tuple[str, nn.Module]]:
        yield "text_encoder", self.tower
