"""Conditioner that combines several conditioners and concatenates their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig
from ldm.conditioning.text_states import TEXT_STATES, TextEncoder
from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.modalities.sizes import Pair
from ldm.nn.conditioning import Conditioning


@dataclass(frozen=True)
class CompositeConditionerConfig(ConditionerConfig, kind="several"):
    """Several conditions, dropped independently; their contexts (along n), vectors and channels are concatenated."""

    parts: Mapping[str, ConditionerConfig] = config_field(
        help="conditioners by name; the names are part of the parameter names"
    )

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("parts is empty; give at least one conditioner.")
        for name in self.parts:
            if not name.isidentifier() or hasattr(nn.ModuleDict, name):
                raise ConfigError(f"a part cannot be named {name!r}; choose another name of letters and underscores.")
        widths = {name: part.context_width for name, part in self.parts.items() if part.context_width is not None}
        if len(set(widths.values())) > 1:
            given = ", ".join(f"{width} of {name}" for name, width in widths.items())
            raise ConfigError(f"the context widths of the parts differ ({given}); make them equal.")
        for name in ("latent_channels", "latent_factor"):
            if len({getattr(part, name) for part in self.parts.values()} - {None}) > 1:
                raise ConfigError(f"the parts differ in {name}; make them equal.")

    @property
    def input_keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.input_keys))

    def defaults(self, height: int, width: int) -> dict[str, Pair]:
        return {name: pair for part in self.parts.values() for name, pair in part.defaults(height, width).items()}

    @property
    def context_width(self) -> int | None:
        return next((part.context_width for part in self.parts.values() if part.context_width is not None), None)

    @property
    def vector_width(self) -> int | None:
        return sum(part.vector_width or 0 for part in self.parts.values()) or None

    @property
    def latent_channels(self) -> int | None:  # type: ignore[override]  # a plain field in the other kinds
        return next((part.latent_channels for part in self.parts.values() if part.latent_channels is not None), None)

    @property
    def latent_factor(self) -> int | None:  # type: ignore[override]
        return next((part.latent_factor for part in self.parts.values() if part.latent_factor is not None), None)

    @property
    def concat_channels(self) -> int:
        return sum(part.concat_channels for part in self.parts.values())

    def resolved(
        self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int
    ) -> CompositeConditionerConfig:
        return replace(
            self, parts={name: part.resolved(clip, latent_size, factor) for name, part in self.parts.items()}
        )

    def with_tokenizer(
        self, make: Callable[[TokenizerConfig, str], Tokenizer], name: str = ""
    ) -> CompositeConditionerConfig:
        parts = {key: part.with_tokenizer(make, f"{name}_{key}") for key, part in self.parts.items()}
        return replace(self, parts=parts)

    def with_encoders(self, configs: Mapping[str, Any]) -> CompositeConditionerConfig:
        return replace(self, parts={key: part.with_encoders(configs) for key, part in self.parts.items()})

    def build(self, tokenizer: Tokenizer | None = None) -> CompositeConditioner:
        return CompositeConditioner(self, tokenizer)


class CompositeConditioner(Conditioner):
    """Conditioner that concatenates the outputs of its parts."""

    def __init__(self, config: CompositeConditionerConfig, tokenizer: Tokenizer | None):
        super().__init__()
        self.config = config
        self.parts = nn.ModuleDict({name: part.build(tokenizer) for name, part in config.parts.items()})

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        stored = inputs.get(TEXT_STATES)
        own = {name: {} if stored is None else {TEXT_STATES: stored.of_part(name)} for name in self.parts}
        return side_by_side([part({**inputs, **own[name]}, generator) for name, part in self.parts.items()])

    def text_encoders(self) -> Iterator[TextEncoder]:
        for name, part in zip(self.parts, self._conditioners(), strict=True):
            yield from (each._replace(name=f"{name}.{each.name}") for each in part.text_encoders())

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        parts = dict(zip(self.parts, self._conditioners(), strict=True))
        frozen = {name: part for name, part in parts.items() if any(True for _ in part.text_encoders())}
        return {
            f"{name}.{key}": each for name, part in frozen.items() for key, each in part.encode_texts(texts).items()
        }

    def unconditional(self, inputs: Mapping[str, Sequence[Any]], negative: Sequence[str] | None = None) -> Conditioning:
        return side_by_side([part.unconditional(inputs, negative) for part in self._conditioners()])

    def prepare_batch(
        self, batch: Mapping[str, Any], encode: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Mapping[str, Any]:
        for part in self._conditioners():
            batch = part.prepare_batch(batch, encode, generator)
        return batch

    def fits(self, text: str) -> bool:
        return all(part.fits(text) for part in self._conditioners())

    def pretrained_encoders(self) -> Iterator[tuple[str, nn.Module]]:
        for part in self._conditioners():
            yield from part.pretrained_encoders()

    def set_vocabulary(self, config: CompositeConditionerConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        for name, part in zip(self.parts, self._conditioners(), strict=True):
            part.set_vocabulary(config.parts[name], tokenizer)

    def load_pretrained(self) -> None:
        for part in self._conditioners():
            part.load_pretrained()

    def _conditioners(self) -> Iterator[Conditioner]:
        for part in self.parts.values():
            assert isinstance(part, Conditioner)
            yield part


def side_by_side(records: list[Conditioning]) -> Conditioning:
    """Concatenate several records of the same batch: contexts along n, vectors along d, concats along c.

    Further contexts keep their names, of which each belongs to one record.

    Records of conditioners without weights may still be on the CPU; all are moved to the device of the others.
    """
    parts = [part for record in records for part in (record.context, record.vector, record.concat) if part is not None]
    device = next((part.device for part in parts if part.device.type != "cpu"), torch.device("cpu"))
    records = [record.to(device) for record in records]
    with_context = [record for record in records if record.context is not None]
    mask = None
    if any(record.mask is not None for record in with_context):
        mask = torch.cat([record.whole_mask() for record in with_context], dim=1)
    return Conditioning(
        context=_joined([record.context for record in with_context]),
        mask=mask,
        vector=_joined([record.vector for record in records]),
        concat=_joined([record.concat for record in records]),
        contexts={name: context for record in records for name, context in record.contexts.items()},
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Concatenate the parts that are not None along the second dimension; None if all are."""
    present = [part for part in parts if part is not None]
    return torch.cat(present, dim=1) if present else None
