"""The text tower: one causal transformer for stage 2 and for the text encoders of SD 1, SD 2 and SDXL.

They differ in their dimensions, in the activation and in the hidden state that is the context of a denoiser:

|                       | activation | hidden_state | context_norm | embed_dim |
|-----------------------|------------|--------------|--------------|-----------|
| SD 1 (OpenAI L)       | quick_gelu | last         | yes          | none      |
| SD 2 (OpenCLIP H)     | gelu       | penultimate  | yes          | none      |
| SDXL (OpenAI L)       | quick_gelu | penultimate  | no           | none      |
| SDXL (OpenCLIP bigG)  | gelu       | penultimate  | no           | 1280      |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm.clip.transformer import Activation, check_shape, stack
from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.nn.embeddings import pad_rows
from ldm.nn.input_output import input_or_output


@dataclass(frozen=True)
class TextTowerConfig:
    """A causal pre-norm transformer over tokens; the defaults are those of OpenAI's ViT-L/14."""

    vocab_size: int = config_field(49408, "rows of the token embedding; at least the tokenizer's vocabulary")
    context_length: int = config_field(77, "maximum number of tokens of a caption, including start and end")
    width: int = config_field(768, "channels of a token, and of the context")
    layers: int = config_field(12, "transformer blocks")
    heads: int = config_field(12, "attention heads; must divide width")
    mlp_ratio: float = config_field(4.0, "hidden width of a block's feed-forward layer over width")
    activation: Activation = config_field("gelu", "quick_gelu for OpenAI's weights, gelu for all others")
    embed_dim: int | None = config_field(None, "width of the projected pooled state; null = no projection")
    hidden_state: Literal["last", "penultimate"] = config_field("last", "block whose output is the context")
    context_norm: bool = config_field(True, "apply the final layer norm to the context")
    eos_id: int | None = config_field(
        None, "end-of-text token, whose first occurrence is pooled; null = the highest token id of the caption"
    )

    def __post_init__(self) -> None:
        check_shape(self.width, self.layers, self.heads)
        if self.context_length < 3:
            raise ConfigError(f"context_length {self.context_length} leaves no room for text; use at least 3.")
        if self.eos_id is not None and not 0 <= self.eos_id < self.vocab_size:
            raise ConfigError(f"the eos_id {self.eos_id} is not below the vocab_size {self.vocab_size}.")

    @property
    def context_depth(self) -> int:
        """Number of blocks whose output is the context."""
        return self.layers - (self.hidden_state == "penultimate")

    def build(self) -> TextTower:
        return TextTower(self)


class TextOutput(NamedTuple):
    """Output of a text tower.

    Attributes:
        context: ``[b n width]``, the hidden state of each token, which a denoiser attends to.
        pooled: ``[b embed_dim]`` (or ``[b width]`` without projection), the state of the end-of-text token.
    """

    context: Tensor
    pooled: Tensor


class TextTower(nn.Module):
    """Encoder of tokens into a context and a pooled state (Radford et al. 2021, arXiv 2103.00020)."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = stack(config.layers, config.width, config.heads, config.mlp_ratio, config.activation, causal=True)
        self.final_norm = nn.LayerNorm(config.width)
        out = nn.Linear(config.width, config.embed_dim, bias=False) if config.embed_dim else None
        self.projection = None if out is None else input_or_output(out)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=config.width**-0.5)

    def forward(self, tokens: Tensor, clip_skip: int = 0) -> TextOutput:
        """``tokens [b n]``, n at most ``context_length``. Padding is not masked, as in SD.

        The context is the state ``clip_skip`` blocks before the configured one; the pooled state is unaffected.
        """
        assert 0 <= clip_skip <= self.config.context_depth, f"clip_skip is {clip_skip}"
        assert tokens.shape[1] <= self.config.context_length, f"{tokens.shape[1]} tokens are too many"
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        x, context = states[-1], states[self.config.context_depth - clip_skip]
        if self.config.context_norm:
            context = self.final_norm(context)
        pooled = self.final_norm(x[torch.arange(len(x), device=x.device), self._end_of_text(tokens)])
        if self.projection is not None:
            pooled = self.projection(pad_rows(pooled))[: len(pooled)]
        return TextOutput(context, pooled)

    def _end_of_text(self, tokens: Tensor) -> Tensor:
        """Return the position of the first end-of-text token, ``[b]``; argmax returns the first of equal values."""
        if self.config.eos_id is None:
            return tokens.argmax(dim=1)
        return (tokens == self.config.eos_id).int().argmax(dim=1)
