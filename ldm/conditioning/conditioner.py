"""The family of conditioners, and the one that says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer
from ldm.config import Kind
from ldm.nn.conditioning import Conditioning


class ConditionerKind(Kind):
    """What a denoiser is conditioned on; ``build`` gives a :class:`Conditioner`.

    ``context_width`` and ``vector_width`` are what it fills of a Conditioning, None where it fills nothing; ``reads`` names the
    raw condition that it needs, ``text`` or ``label``.
    """

    reads: ClassVar[str | None] = None

    @property
    def context_width(self) -> int | None:
        return None

    @property
    def vector_width(self) -> int | None:
        return None

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
            inputs: raw conditions by name, a sequence of ``b`` each: ``text`` (list of str), ``label`` (``[b]`` of int).
            generator: when given (training), each example's condition is dropped at the conditioner's rate, drawn from it.
        """
        raise NotImplementedError

    def unconditional(self, n: int) -> Conditioning:
        """The conditioning of ``n`` examples that are conditioned on nothing; what a dropped condition becomes."""
        raise NotImplementedError


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

    def unconditional(self, n: int) -> Conditioning:
        return Conditioning()
