"""Short token sequences: a text tower that sees some of the tokens in training (Li et al. 2023, "CLIPA", arXiv 2305.07017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.nn.ranks import draw_rows


@dataclass(frozen=True)
class TokenChoiceConfig:
    """Tokens of a caption that training uses; validation and the following stages use all."""

    length: int | None = config_field(None, "most tokens of a caption, including start and end; null = all")
    choice: Literal["first", "block", "random"] = config_field(
        "first",
        "which tokens of a longer caption are used: the first ones, a block of neighbours from a random place, or random ones in "
        "their order",
    )

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 3:
            raise ConfigError(f"length {self.length} leaves no room for text; use at least 3, or null for all tokens.")

    def apply(
        self, tokens: Tensor, eos_id: int, pad_id: int, context_length: int, generator: torch.Generator
    ) -> Tensor:
        """Choose tokens of each caption, keeping start, end and order: ``[b n] -> [b m]``, m the longest.

        Args:
            tokens: rows of start, text, end and padding, of which there may be none.
            eos_id: end token.
            pad_id: padding.
            context_length: most tokens of a row in any batch.
            generator: source of the random numbers, those of the rows of all ranks.
        """
        if self.length is None or tokens.shape[1] <= self.length:
            return tokens
        (b, n), room = tokens.shape, self.length - 2
        place = torch.arange(n, device=tokens.device).expand(b, n)
        end = (tokens == eos_id).int().argmax(dim=1, keepdim=True)  # the first, as padding may be the same token
        inner = (place > 0) & (place < end)
        if self.choice == "first":
            rank = place - 1
        elif self.choice == "block":
            start = draw_rows(lambda m: torch.rand(m, 1, generator=generator), b, generator)
            start = (start * (end - 1 - room + 1).clamp(min=1)).long()
            rank = torch.where(place - 1 >= start, place - 1 - start, n)
        else:
            score = draw_rows(lambda m: torch.rand(m, context_length, generator=generator), b, generator)[:, :n]
            rank = score.masked_fill(~inner, 2.0).argsort(dim=1).argsort(dim=1)
        kept = (place == 0) | (place == end) | (inner & (rank < room))
        order = (~kept).int().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
        chosen = tokens.gather(1, order)
        return chosen.where(kept.gather(1, order), pad_id)
