"""Conditioner of SDXL: captions encoded by two text towers, and the sizes of the image.

(Podell et al. 2023, arXiv 2307.01952.) The contexts of the towers are concatenated along their width; the vector is the
pooled state of the second tower, followed by the sinusoidal embeddings of six numbers (section 2.2): the original size of
a training image, its crop position, and its target size. With these, training can use small originals and crops without
generated images imitating them: sampling is conditioned on a large original, cropped at (0, 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig
from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning import long_prompts
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, captions, check_dropout
from ldm.conditioning.text_states import TextEncoder
from ldm.config import config_field, to_dict
from ldm.errors import ConfigError
from ldm.modalities.sizes import SIZES, Pair
from ldm.nn.conditioning import Conditioning
from ldm.nn.embeddings import sinusoidal


@dataclass(frozen=True)
class SDXLConditionerConfig(ConditionerConfig, kind="sdxl"):
    """A caption, encoded by two text towers, and the original size, crop position and target size of the image."""

    second: TextTowerConfig = config_field(help="the second text tower, whose pooled state is part of the vector")
    first: TextTowerConfig | None = config_field(
        None, "the first text tower; null = taken from the experiment's clip section"
    )
    pad_id: int = config_field(0, "padding token of the second tower; both towers use the vocabulary of the first")
    size_embedding_width: int = config_field(256, "width of the sinusoidal embedding of each of the six size numbers")
    dropout: float = config_field(
        0.1,
        "fraction of the training captions (never sizes) that are dropped, for classifier-free guidance",
        changeable=True,
    )
    zeros_for_empty: bool = config_field(
        True, "encode a dropped or absent caption as zeros; false = as the empty string"
    )
    trainable: bool = config_field(False, "train both towers along with the denoiser")

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        if self.size_embedding_width < 2 or self.size_embedding_width % 2:
            raise ConfigError(f"size_embedding_width must be even and at least 2, not {self.size_embedding_width}.")
        if not 0 <= self.pad_id < self.second.vocab_size:
            raise ConfigError(f"the pad_id {self.pad_id} is not below second.vocab_size, {self.second.vocab_size}.")
        for name in ("vocab_size", "context_length") if self.first else ():
            found, wanted = getattr(self.second, name), getattr(self.first, name)
            if found != wanted:
                raise ConfigError(
                    f"second.{name} is {found}, but that of the first tower is {wanted}; make them equal, "
                    "since both read the same tokens."
                )

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("text",)

    def defaults(self, height: int, width: int) -> dict[str, Pair]:
        return dict(zip(SIZES, ((height, width), (0, 0), (height, width)), strict=True))

    @property
    def context_width(self) -> int | None:
        return self.first.width + self.second.width if self.first else None

    @property
    def vector_width(self) -> int:
        return (self.second.embed_dim or self.second.width) + 2 * len(SIZES) * self.size_embedding_width

    def resolved(self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int) -> SDXLConditionerConfig:
        if clip is None:
            raise ConfigError(
                "denoiser.conditioner takes text, but there is no clip section that defines its first tower."
            )
        return replace(self, first=self.first or replace(clip.text, embed_dim=clip.embed_dim))

    def with_encoders(self, configs: Mapping[str, Any]) -> SDXLConditionerConfig:
        first, second = configs.get("text_encoder", self.first), configs.get("text_encoder_2", self.second)
        return replace(self, first=first, second=second)

    def build(self, tokenizer: Tokenizer | None = None) -> SDXLConditioner:
        assert self.first is not None, "the first tower comes from the clip section"
        assert tokenizer is not None, "a text conditioner needs a tokenizer"
        long_prompts.check_vocabulary(tokenizer, self.first)
        return SDXLConditioner(self, self.first, tokenizer)


class SDXLConditioner(Conditioner):
    """Two text towers with a tokenizer each; texts are truncated or split into windows as in :class:`TextConditioner`.

    In addition to ``text`` it takes ``original_size``, ``crops_coords_top_left`` and ``target_size``: a pair for each image,
    (height, width) or (top, left) in pixels.
    """

    def __init__(self, config: SDXLConditionerConfig, first: TextTowerConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizers = (tokenizer, tokenizer.with_padding(config.pad_id))
        self.first = first.build().requires_grad_(config.trainable)
        self.second = config.second.build().requires_grad_(config.trainable)

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        given = captions(inputs, self.config.dropout, generator)
        states = self.text_states(inputs, ["" if caption is None else caption for caption in given])
        context, mask, pooled = states["context"], states.get("mask"), states["pooled"]
        if self.config.zeros_for_empty:
            absent = torch.tensor([caption is None for caption in given], device="cpu").to(context.device)
            context, pooled = context.masked_fill(absent[:, None, None], 0), pooled.masked_fill(absent[:, None], 0)
        return Conditioning(context, mask, vector=torch.cat([pooled, self._sizes(inputs).to(pooled)], dim=1))

    def text_encoders(self) -> Iterator[TextEncoder]:
        for (name, tower), tokenizer in zip(self.pretrained_encoders(), self.tokenizers, strict=True):
            if not self.config.trainable:
                yield TextEncoder(name, tower, to_dict(tower.config), tokenizer.to_json())

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        with nullcontext() if self.config.trainable else torch.no_grad():
            (first, _), mask = long_prompts.read(texts, self.tokenizers[0], self.first)
            (second, pooled), second_mask = long_prompts.read(texts, self.tokenizers[1], self.second)
        context, mask = _side_by_side([first, second], [mask, second_mask])
        return {"context": context, "pooled": pooled} | ({} if mask is None else {"mask": mask})

    def unconditional(self, inputs: Mapping[str, Sequence[Any]], negative: Sequence[str] | None = None) -> Conditioning:
        """Compute the conditioning of no text, or of the ``negative`` one, for images of the same sizes."""
        absent = [None] * len(inputs["text"])
        return self({**inputs, "text": absent if negative is None else negative})

    def _sizes(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the embeddings of the sizes, ``[b 6 size_embedding_width]`` flattened to two dimensions."""
        numbers = torch.cat([torch.as_tensor(inputs[name]) for name in SIZES], dim=1)
        return sinusoidal(numbers.flatten(), self.config.size_embedding_width).reshape(len(numbers), -1)

    def set_vocabulary(self, config: SDXLConditionerConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizers = config, (tokenizer, tokenizer.with_padding(config.pad_id))

    def fits(self, text: str) -> bool:
        return all(len(tokenizer.windows(text)[0]) == 1 for tokenizer in self.tokenizers)

    def pretrained_encoders(self) -> Iterator[tuple[str, nn.Module]]:
        yield "text_encoder", self.first
        yield "text_encoder_2", self.second


def _side_by_side(contexts: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Concatenate contexts ``[b n d]`` along d; the context of a tower that needs fewer windows is padded with zeros.

    The towers can need different numbers of windows: the padding token is not merged with its neighbours within a text, so
    that "!!" may be two tokens for one tower and one for the other.
    """
    length = max(context.shape[1] for context in contexts)
    if all(mask is None for mask in masks) and all(context.shape[1] == length for context in contexts):
        return torch.cat(list(contexts), dim=2), None
    present = torch.zeros(len(contexts[0]), length, dtype=torch.bool, device=contexts[0].device)
    for context, mask in zip(contexts, masks, strict=True):
        present[:, : context.shape[1]] |= True if mask is None else mask
    padded = [F.pad(context, (0, 0, 0, length - context.shape[1])) for context in contexts]
    return torch.cat(padded, dim=2), present
