"""Stored outputs of frozen text encoders, which conditioners use instead of encoding the captions of a batch again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TEXT_STATES = "text_states"
"""Key of the :class:`TextStates` among the inputs of a conditioner."""


class TextEncoder(NamedTuple):
    """A frozen text encoder of a conditioner, with everything that its outputs depend on.

    Attributes:
        name: name within the conditioner.
        network: the module.
        config: what shapes its outputs besides its weights, as JSON values.
        tokenizer: its tokenizer, as JSON text.
    """

    name: str
    network: nn.Module
    config: Mapping[str, Any]
    tokenizer: str


@dataclass(frozen=True)
class TextStates:
    """Outputs of the frozen text encoders of a conditioner for the captions of a batch.

    Attributes:
        captions: the captions, ``b``.
        stored: the outputs for them, ``[b ...]`` each, by the names that :meth:`Conditioner.encode_texts` gives them.
        empty: the outputs for the empty caption, ``[1 ...]`` each, by the same names.
    """

    captions: Sequence[str]
    stored: Mapping[str, Tensor]
    empty: Mapping[str, Tensor]

    def of_part(self, name: str) -> TextStates:
        """Return the outputs of one part of a composite conditioner."""
        prefix = f"{name}."

        def own(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): each for key, each in states.items() if key.startswith(prefix)}

        return TextStates(self.captions, own(self.stored), own(self.empty))

    def select(self, texts: Sequence[str]) -> dict[str, Tensor] | None:
        """Return the outputs for the texts of a batch, fp32: each its caption, or empty where the caption was dropped.

        None if a text is neither, or nothing is stored.
        """
        dropped = [not text and bool(caption) for text, caption in zip(texts, self.captions, strict=True)]
        if not self.stored or any(
            text != caption and not is_dropped
            for text, caption, is_dropped in zip(texts, self.captions, dropped, strict=True)
        ):
            return None
        mask = torch.tensor(dropped, device="cpu")
        return {name: _replaced(states, self.empty[name], mask) for name, states in self.stored.items()}


def _replaced(states: Tensor, empty: Tensor, mask: Tensor) -> Tensor:
    """Return ``states [b ...]``, floating-point values as fp32, with ``empty [1 ...]`` where ``mask [b]`` is true."""
    states, empty = (each.float() if each.is_floating_point() else each for each in (states, empty))
    if not mask.any():
        return states
    return torch.where(mask.to(states.device).reshape(-1, *[1] * (states.ndim - 1)), empty.to(states.device), states)
