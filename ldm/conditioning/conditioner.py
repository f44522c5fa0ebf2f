"""The base classes of conditioners, and the conditioner of unconditional models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.conditioning.text_states import TEXT_STATES, TextEncoder, TextStates
from ldm.config import Kind
from ldm.errors import ConfigError, DataError
from ldm.modalities.arguments import of_key
from ldm.modalities.sizes import Pair
from ldm.nn.conditioning import Conditioning
from ldm.nn.ranks import rand_rows


class ConditionerConfig(Kind):
    """Config of a conditioner; ``build`` makes the :class:`Conditioner`.

    Attributes:
        input_keys: keys of the modalities (:mod:`ldm.modalities`) that it takes, such as ``text`` or ``label``.
        context_width, vector_width: width of these fields of the :class:`Conditioning` that it makes; None: not filled.
        concat_channels: channels that it concatenates to the latent; 0: none.
        latent_channels, latent_factor: properties that the first stage must have; None: any.
    """

    latent_channels: int | None = None
    latent_factor: int | None = None

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ()

    def defaults(self, height: int, width: int) -> Mapping[str, Pair]:
        """Return the raw conditions that a caller may omit, with defaults for images of ``height`` × ``width`` pixels."""
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
        """Return a copy with the fields filled in that follow from the rest of an experiment.

        Args:
            clip: the model of the clip section, if there is one.
            latent_size: height and width of the latents.
            factor: downsampling factor of the first stage.

        Raises:
            ConfigError: the experiment lacks something that the conditioner needs.
        """
        return self

    def with_tokenizer(self, make: Callable[[TokenizerConfig, str], Tokenizer], name: str = "") -> ConditionerConfig:
        """Return a copy with the tokenizer filled in, for conditioners that have their own.

        Args:
            make: makes the tokenizer that a config describes, for the conditioner ``name``.
            name: name of this conditioner in a composite.
        """
        return self

    def with_encoders(self, configs: Mapping[str, Any]) -> ConditionerConfig:
        """Return the config with those of its pretrained encoders replaced that are in ``configs``, by component."""
        return self

    def build(self, tokenizer: Tokenizer | None = None) -> Conditioner:
        """Build the module; parameters that are not trained with the denoiser are frozen.

        Args:
            tokenizer: the tokenizer of the clip section.
        """
        raise NotImplementedError


class Conditioner(nn.Module):
    """Encoder of the raw conditions of a batch into a :class:`Conditioning`.

    Attributes:
        unaffected_by_cfg: if True, the condition is also used in the unconditional pass of classifier-free guidance.
    """

    unaffected_by_cfg: ClassVar[bool] = False

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        """Compute the conditioning of a batch.

        Args:
            inputs: raw conditions by key, a tensor or sequence of ``b`` entries each, as the modality of that key in
                :mod:`ldm.modalities` describes them. An entry of None is absent and treated like a dropped one;
                sizes are never absent.
            generator: if given (training), each example's condition is dropped at the conditioner's rate, drawn from it
                (by :func:`dropped`, or another function of :mod:`ldm.nn.ranks`).

        Raises:
            DataError: the data has no such condition.
            SamplingError: an entry is malformed.
        """
        raise NotImplementedError

    def unconditional(self, inputs: Mapping[str, Sequence[Any]], negative: Sequence[str] | None = None) -> Conditioning:
        """Compute the conditioning of the unconditional pass of classifier-free guidance.

        Args:
            inputs: as in :meth:`forward`; all are dropped unless the conditioner is ``unaffected_by_cfg``.
            negative: texts in place of the dropped ones.
        """
        if self.unaffected_by_cfg:
            return self(inputs)
        absent: dict[str, Sequence[Any]] = {name: [None] * len(values) for name, values in inputs.items()}
        return self(absent if negative is None else absent | {"text": negative})

    def prepare_batch(
        self, batch: Mapping[str, Any], encode: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Mapping[str, Any]:
        """Add the raw conditions that are computed from the training images to a batch; by default none.

        Args:
            batch: ``image [b 3 h w]`` in [-1, 1], unless latents are cached, and its annotations.
            encode: encodes images into normalized latents ``[b c h/f w/f]``.
            generator: random generator of the conditions.

        Raises:
            DataError: latents are cached, but the images are needed.
        """
        return batch

    def fits(self, text: str) -> bool:
        """Return True unless ``text`` has more tokens than the conditioner reads of a caption in training."""
        return True

    def pretrained_encoders(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the encoders that start from pretrained weights, by component: ``text_encoder``, ``image_encoder``, ..."""
        return iter(())

    def text_encoders(self) -> Iterator[TextEncoder]:
        """Yield the frozen text encoders, whose outputs may be stored; see :meth:`encode_texts`."""
        return iter(())

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the outputs of the text encoders for ``b`` texts: tensors ``[b ...]`` by name, such as ``context``.

        They depend on the texts alone, and :meth:`forward` needs nothing else of the encoders.
        """
        return {}

    def text_states(self, inputs: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """Return :meth:`encode_texts`, from the :class:`TextStates` in the inputs if they have these texts."""
        stored: TextStates | None = inputs.get(TEXT_STATES)
        found = None if stored is None else stored.select(texts)
        return self.encode_texts(texts) if found is None else found

    def set_vocabulary(self, config: Any, tokenizer: Tokenizer) -> None:
        """Set the config and tokenizer of a conditioner whose text encoders have got other token embeddings."""

    def load_pretrained(self) -> None:
        """Load the weights of the checkpoint that the config names; called when training starts."""


def input_of(inputs: Mapping[str, Any], key: str) -> Any:
    """Return the entries of a raw condition.

    Raises:
        DataError: the inputs do not have it; the message names the files that the data needs.
    """
    if key not in inputs:
        raise DataError(of_key(key).missing)
    return inputs[key]


def training_images(batch: Mapping[str, Any], kind: str) -> Tensor:
    """Return the images of a batch, ``[b 3 h w]`` in [-1, 1], from which the conditioner ``kind`` computes its input.

    Raises:
        DataError: the batch has cached latents instead.
    """
    if "image" not in batch:
        raise DataError(
            f"the conditioner {kind} is computed from the training images, which cached latents do not contain; "
            "set data.cache_latents to false and data.encoded.folder to null."
        )
    images: Tensor = batch["image"]
    return images


def check_dropout(dropout: float) -> None:
    """Raise a ConfigError unless the rate is in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), not {dropout}.")


def dropped(n: int, rate: float, generator: torch.Generator | None) -> Tensor:
    """Return ``[n]`` of bool, True where an example's condition is dropped; all False without a generator."""
    if generator is None:
        return torch.zeros(n, dtype=torch.bool, device="cpu")
    return rand_rows(n, generator) < rate


def captions(inputs: Mapping[str, Any], rate: float, generator: torch.Generator | None) -> list[str | None]:
    """Return the captions of a batch; None for those that are absent or, at this rate, dropped."""
    given = list(input_of(inputs, "text"))
    drop = dropped(len(given), rate, generator).tolist()
    return [None if is_dropped else caption for caption, is_dropped in zip(given, drop, strict=True)]


def texts(inputs: Mapping[str, Any], rate: float, generator: torch.Generator | None) -> list[str]:
    """Return :func:`captions` with the empty text in place of None."""
    return ["" if caption is None else caption for caption in captions(inputs, rate, generator)]


@dataclass(frozen=True)
class NoConditionerConfig(ConditionerConfig, kind="none"):
    """Config of an unconditional model."""

    def build(self, tokenizer: Tokenizer | None = None) -> NoConditioner:
        return NoConditioner()


class NoConditioner(Conditioner):
    """Conditioner with an empty output."""

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        return Conditioning()
