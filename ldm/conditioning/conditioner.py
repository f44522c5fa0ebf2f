"""The family of conditioners, and the one that says nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer
from ldm.config import Kind
from ldm.errors import DataError
from ldm.nn.conditioning import Conditioning


class ConditionerKind(Kind):
    """What a denoiser is conditioned on; ``build`` gives a :class:`Conditioner`.

    ``context_width``, ``vector_width`` and ``concat_channels`` are what it fills of a Conditioning, None or 0 where it
    fills nothing; ``reads`` names the raw conditions that it takes, such as ``text`` or ``label``.
    ``latent_channels`` and ``latent_factor`` are those of the first stage that it counts on; None: any will do.
    """

    latent_channels: int | None = None
    latent_factor: int | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def context_width(self) -> int | None:
        return None

    @property
    def vector_width(self) -> int | None:
        return None

    @property
    def concat_channels(self) -> int:
        return 0

    @property
    def trainable(self) -> bool:
        """Whether its weights are trained along with the denoiser."""
        return True

    def build(self, tokenizer: Tokenizer | None = None) -> Conditioner:
        """The module; ``tokenizer`` serves those that read text."""
        raise NotImplementedError


class Conditioner(nn.Module):
    """Raw conditions of a batch to the record that the denoiser reads."""

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        """The conditioning of a batch.

        Args:
            inputs: raw conditions by name, a sequence of ``b`` each: ``text`` (of str), ``label`` (of int). An entry of None
                is a condition that is not there, like one that was dropped.
            generator: when given (training), each example's condition is dropped at the conditioner's rate, drawn from it.
        """
        raise NotImplementedError

    def unconditional(self, inputs: Mapping[str, Sequence[Any]], negative: Sequence[str] | None = None) -> Conditioning:
        """What guidance leads away from, for a batch with these conditions: all of them dropped.

        Args:
            inputs: as of :meth:`forward`.
            negative: texts in place of the dropped ones.
        """
        absent: dict[str, Sequence[Any]] = {name: [None] * len(values) for name, values in inputs.items()}
        return self(absent if negative is None else absent | {"text": negative})

    def of_training(
        self, batch: Mapping[str, Any], encode: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Mapping[str, Any]:
        """A batch of the data with the raw conditions that are made from its pictures; here as it is.

        Args:
            batch: ``image [b 3 h w]`` in [-1, 1], unless latents are cached, and what the data say of it.
            encode: pictures to normalised latents ``[b c h/f w/f]``.
            generator: source of what is random about the conditions.
        """
        return batch


def training_pictures(batch: Mapping[str, Any], kind: str) -> Tensor:
    """The pictures of a batch, ``[b 3 h w]`` in [-1, 1], from which the conditioner ``kind`` makes what it reads.

    Raises:
        DataError: the batch has latents instead.
    """
    if "image" not in batch:
        raise DataError(
            f"the conditioner {kind} is made from the training pictures, which cached latents do not carry; "
            "set data.cache_latents to false."
        )
    pictures: Tensor = batch["image"]
    return pictures


def dropped(n: int, rate: float, generator: torch.Generator | None) -> Tensor:
    """``[n]`` of bool: which examples lose their condition."""
    if generator is None:
        return torch.zeros(n, dtype=torch.bool)
    return torch.rand(n, generator=generator) < rate


@dataclass(frozen=True)
class NoConditionerConfig(ConditionerKind, kind="none"):
    """An unconditional model."""

    def build(self, tokenizer: Tokenizer | None = None) -> NoConditioner:
        return NoConditioner()


class NoConditioner(Conditioner):
    """An empty record for every batch."""

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        return Conditioning()
