"""The family of conditioners, and the one that says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.config import Kind
from ldm.errors import ConfigError, DataError
from ldm.nn.conditioning import Conditioning

Pair = tuple[int, int]
"""Height and width, or top and left, in pixels."""


class ConditionerConfig(Kind):
    """What a denoiser is conditioned on; ``build`` gives a :class:`Conditioner`.

    ``context_width``, ``vector_width`` and ``concat_channels`` are what it fills of a Conditioning, None or 0 where it
    fills nothing; ``input_keys`` names the raw conditions that it takes, such as ``text`` or ``label``.
    ``latent_channels`` and ``latent_factor`` are those of the first stage that it counts on; None: any will do.
    """

    latent_channels: int | None = None
    latent_factor: int | None = None

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ()

    def defaults(self, height: int, width: int) -> Mapping[str, Pair]:
        """Raw conditions that it takes besides, and may be left out: each with what it then is for images of this size."""
        return {}

    @property
    def context_width(self) -> int | None:
        return None

    @property
    def vector_width(self) -> int | None:
        return None

    @property
    def concat_channels(self) -> int:
        return 0

    def resolved(self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int) -> ConditionerConfig:
        """Itself, with what follows from the rest of an experiment filled in.

        Args:
            clip: the model of the clip section, if there is one.
            latent_size: height and width of the latents.

        Raises:
            ConfigError: something that it needs is not there.
        """
        return self

    def with_tokenizer(self, make: Callable[[TokenizerConfig, str], Tokenizer], name: str = "") -> ConditionerConfig:
        """Itself, with a tokenizer of its own filled in where it has one.

        Args:
            make: gives the tokenizer that the config describes, for the conditioner ``name``.
            name: of this conditioner among several.
        """
        return self

    def with_encoder(self, name: str, config: Any) -> ConditionerConfig:
        """Return the config with that of its pretrained encoder ``name`` replaced, if it has such an encoder."""
        return self

    def build(self, tokenizer: Tokenizer | None = None) -> Conditioner:
        """The module, what is not trained along with the denoiser frozen; ``tokenizer`` is that of the clip section."""
        raise NotImplementedError


class Conditioner(nn.Module):
    """Raw conditions of a batch to the record that the denoiser reads.

    ``unaffected_by_cfg`` says that guidance leaves the condition as it is, in the pass too that it leads away from.
    """

    unaffected_by_cfg: ClassVar[bool] = False

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        """The conditioning of a batch.

        Args:
            inputs: raw conditions by name, a sequence of ``b`` each: ``text`` (of str), ``label`` (of int), ``image``
                (of ``[3 h w]`` in [-1, 1]), ``boxes`` (of lists of (class, x0, y0, x1, y1)), ``semantic`` (of ``[h w]``
                of int), ``original_size``, ``crops_coords_top_left`` and ``target_size`` (of :data:`Pair`). An entry of
                None is a condition that is not there, like one that was dropped; of the last three there is none.
            generator: when given (training), each example's condition is dropped at the conditioner's rate, drawn from it.
        """
        raise NotImplementedError

    def unconditional(self, inputs: Mapping[str, Sequence[Any]], negative: Sequence[str] | None = None) -> Conditioning:
        """What guidance leads away from, for a batch with these conditions: all dropped but what is ``unaffected_by_cfg``.

        Args:
            inputs: as of :meth:`forward`.
            negative: texts in place of the dropped ones.
        """
        if self.unaffected_by_cfg:
            return self(inputs)
        absent: dict[str, Sequence[Any]] = {name: [None] * len(values) for name, values in inputs.items()}
        return self(absent if negative is None else absent | {"text": negative})

    def prepare_batch(
        self, batch: Mapping[str, Any], encode: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Mapping[str, Any]:
        """A batch of the data with the raw conditions that are made from its images; here as it is.

        Args:
            batch: ``image [b 3 h w]`` in [-1, 1], unless latents are cached, and what the data say of it.
            encode: images to normalised latents ``[b c h/f w/f]``.
            generator: source of what is random about the conditions.
        """
        return batch

    def pretrained_encoders(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the encoders that start from pretrained weights, by component: ``text_encoder``, ``image_encoder``, ..."""
        return iter(())

    def load_pretrained(self) -> None:
        """Take over the weights of a checkpoint that its config names, as a training does at its start."""


def training_pictures(batch: Mapping[str, Any], kind: str) -> Tensor:
    """The images of a batch, ``[b 3 h w]`` in [-1, 1], from which the conditioner ``kind`` makes what it reads.

    Raises:
        DataError: the batch has latents instead.
    """
    if "image" not in batch:
        raise DataError(
            f"the conditioner {kind} is made from the training images, which cached latents do not carry; "
            "set data.cache_latents to false."
        )
    pictures: Tensor = batch["image"]
    return pictures


def check_dropout(dropout: float) -> None:
    """Raises a ConfigError for what is no share below 1."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), not {dropout}.")


def dropped(n: int, rate: float, generator: torch.Generator | None) -> Tensor:
    """``[n]`` of bool: which examples lose their condition."""
    if generator is None:
        return torch.zeros(n, dtype=torch.bool)
    return torch.rand(n, generator=generator) < rate


def captions(inputs: Mapping[str, Any], rate: float, generator: torch.Generator | None) -> list[str | None]:
    """The captions of a batch; None for those that are not there or, at this rate, dropped."""
    given = list(inputs["text"])
    drop = dropped(len(given), rate, generator).tolist()
    return [None if gone else caption for caption, gone in zip(given, drop, strict=True)]


def texts(inputs: Mapping[str, Any], rate: float, generator: torch.Generator | None) -> list[str]:
    """As :func:`captions`, the empty text in place of None."""
    return ["" if caption is None else caption for caption in captions(inputs, rate, generator)]


@dataclass(frozen=True)
class NoConditionerConfig(ConditionerConfig, kind="none"):
    """An unconditional model."""

    def build(self, tokenizer: Tokenizer | None = None) -> NoConditioner:
        return NoConditioner()


class NoConditioner(Conditioner):
    """An empty record for every batch."""

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        return Conditioning()
