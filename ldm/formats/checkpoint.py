"""Content of a file or folder of any format under native names: the parts of a model, and its settings.

Readers of a format make a :class:`Checkpoint`, writers take one; between them lies :class:`LatentDiffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning import ConditionerConfig
from ldm.conditioning.composite import CompositeConditionerConfig
from ldm.conditioning.inpaint import InpaintConditionerConfig
from ldm.conditioning.sdxl import SDXLConditionerConfig
from ldm.conditioning.text import TextConditionerConfig
from ldm.diffusion.parametrization import Diffusion
from ldm.errors import CheckpointError, ConfigError, some
from ldm.formats.native import (
    CLIP,
    CONFIG_BY_FORMAT,
    DECODER,
    FIRST_STAGE,
    Header,
    assemble,
    build_on_meta,
    fingerprinted_metadata,
    header_of,
    metadata_of,
)
from ldm.formats.tensors import to_dtype
from ldm.formats.training_checkpoint import training_note
from ldm.load_options import ARGUMENTS
from ldm.model import Component, LatentDiffusion, ModelConfig, SamplingConfig, components

if TYPE_CHECKING:
    from ldm.nn.network_format import NetworkFormat, NetworkKind, Values

NETWORKS = ("first_stage", "denoiser")
"""Parts that every complete model has."""

TINY_DECODER = "tiny_decoder"
"""Part that a model may have in addition; all others are encoders of its conditioner."""

CONTROLNET = "controlnet"
"""Part that is no part of a model: a ControlNet, alone or in a file with a complete model."""

OTHERS = "others"
"""Part with the weights that are in no other part, under the names of the complete model or CLIP."""

CLIP_COMPONENTS = {"text_encoder": "text", "image_encoder": "image"}
"""Parts of a CLIP, and their prefixes in its state dict."""

LATENT_STATISTICS = ("latent_mean", "latent_std", "latent_preview")
"""Entries of a first stage's state dict that are not weights; each format stores them in its own way."""


@dataclass(frozen=True)
class Part:
    """A network: its config, and its state dict.

    Attributes:
        config, state: of the network.
        inferred: whether the source does not say how the latents are scaled, for a first stage.
        diffusion: the schedule and parametrization of a denoiser, if its source has them.
    """

    config: Any
    state: Mapping[str, Tensor]
    inferred: bool = False
    diffusion: Diffusion | None = None

    @classmethod
    def imported(
        cls,
        config: Any,
        tensors: Mapping[str, Tensor],
        form: NetworkFormat,
        source: object,
        values: Values | None = None,
    ) -> Part:
        """Import foreign tensors, by views; see :func:`ldm.nn.network_format.import_weights`.

        Args:
            config: config of the network.
            tensors: by canonical names of the format.
            form: description of the network in the foreign format.
            source: file, for error messages.
            values: JSON config of the network in the foreign format, if it has one.
        """
        from ldm.nn.network_format import import_weights

        values = values or {}
        network = build_on_meta(lambda: form.build(config, values), tensors, source)
        expected = cls(config, network.state_dict()).weights
        state = import_weights(tensors, form.key_table(config, expected, values), expected, source)
        statistics = {"latent_mean": torch.zeros, "latent_std": torch.ones}
        channels = {name: each.shape for name, each in network.state_dict().items() if name in statistics}
        return cls(config, state | {name: statistics[name](shape) for name, shape in channels.items()})

    @property
    def kind(self) -> NetworkKind:
        """Description of this kind of network in foreign formats."""
        from ldm.formats.kinds import kind_of

        return kind_of(self.config)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state without the statistics of the latents."""
        return {name: tensor for name, tensor in self.state.items() if name not in LATENT_STATISTICS}

    def with_config(self, **changes: Any) -> Part:
        """Change fields of the config, and leave out the weights that a network of the new config does not have."""
        config = replace(self.config, **changes)
        kept = build_on_meta(config.build, self.state, type(config).__name__).state_dict()
        return replace(self, config=config, state={name: each for name, each in self.state.items() if name in kept})

    def marked_overflowing(self, overflows: bool) -> Part:
        """Set whether fp16 cannot hold the values of a first stage, where its config has such a field."""
        known = hasattr(self.config, "overflows_fp16")
        return replace(self, config=replace(self.config, overflows_fp16=overflows)) if known else self

    def trained_for(self, diffusion: Diffusion) -> Part:
        """Return a denoiser with the schedule and parametrization that it was trained for."""
        return replace(self, diffusion=diffusion)

    def to(self, dtype: torch.dtype | None) -> Part:
        """Convert the weights to ``dtype``; the statistics of the latents are unchanged."""
        return replace(
            self, state={**self.state, **{name: to_dtype(each, dtype) for name, each in self.weights.items()}}
        )

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.numel() for tensor in self.weights.values())


@dataclass(frozen=True)
class Checkpoint:
    """Content of a source; a single network is a checkpoint of one part.

    Attributes:
        source: file or folder, for error messages.
        layout: ``native``, ``ldm`` (single file), ``diffusers``, ``transformers`` or ``open_clip``.
        kind: family of models that it was recognized as, such as ``SD 1``.
        parts: networks by the names of :func:`ldm.model.components`; of a model or CLIP also :data:`OTHERS`.
        tokenizer: tokenizer of the text encoders.
        conditioner: config of the conditioner that the encoders are part of.
        diffusion, sampling, size: settings of the complete model, if the source has them.
        provenance: where the source comes from, as JSON values.
        fingerprint: fingerprint that the source was written with; empty for none.
        fingerprinted: metadata that the fingerprint covers; empty for none.
        notes: evidence for inferred settings, one sentence each.
        marks: names of tensors and metadata that state settings of the model.
        unused: names of tensors that no network needs.
    """

    source: str
    layout: str
    kind: str
    parts: Mapping[str, Part]
    tokenizer: Tokenizer | None = None
    conditioner: ConditionerConfig | None = None
    diffusion: Diffusion | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    size: tuple[int, int] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    fingerprinted: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def config(self) -> ModelConfig:
        """Return the config of the complete model.

        Raises:
            CheckpointError: a part is missing, or the parts do not fit each other.
        """
        absent = self.missing()
        if absent or self.conditioner is None:
            raise CheckpointError(
                f"{self.source} is not a complete model: it lacks {' and '.join(absent)}; name one that has "
                f"{'it' if len(absent) == 1 else 'them'} ({', '.join(f'{name}=...' for name in absent)})."
            )
        try:
            return ModelConfig(
                first_stage=self.parts["first_stage"].config,
                conditioner=self.conditioner,
                denoiser=self.parts["denoiser"].config,
                diffusion=self.diffusion or Diffusion(),
                size=self.size or (512, 512),
                sampling=self.sampling,
                tiny_decoder=self.parts[TINY_DECODER].config if TINY_DECODER in self.parts else None,
            )
        except ConfigError as error:
            raise CheckpointError(f"the parts of {self.source} do not fit each other: {error}") from None

    def part(self, name: str) -> Part:
        """Return a part by its name.

        Raises:
            CheckpointError: there is no part of this name.
        """
        if name not in self.parts:
            held = " and ".join(each for each in self.parts if each != OTHERS)
            raise CheckpointError(
                f"{self.source} holds no {name}, but {held or 'nothing that ldm knows'}; name another source."
            )
        return self.parts[name]

    def encoders(self) -> list[str]:
        """Return the names of the parts that encode conditions."""
        return [name for name in self.parts if name not in (*NETWORKS, TINY_DECODER, CONTROLNET, OTHERS)]

    def missing(self) -> list[str]:
        """Return the parts that a complete model has and this one lacks, by the arguments of :func:`ldm.load`."""
        return [ARGUMENTS[name] for name in NETWORKS if name not in self.parts] + ["text_encoder"] * (
            self.conditioner is None
        )

    def with_part(self, name: str, other: Checkpoint) -> Checkpoint:
        """Replace a part, or add one that is missing, by that of another checkpoint.

        Raises:
            CheckpointError: the other has no such part.
        """
        source = f"{self.source} with the {name} of {other.source}"
        changed = replace(self, source=source, fingerprint="", fingerprinted={})
        if name == TINY_DECODER:
            return replace(changed, parts={**self.parts, name: other.part(name)})
        encoders, own = other.encoders(), self.parts.get(name)
        single = len(encoders) == 1 and own is not None and type(own.config) is type(other.parts[encoders[0]].config)
        if own is None and name not in NETWORKS and "text_encoder" in encoders and name != encoders[0]:
            raise CheckpointError(
                f"{self.source} has no second text encoder; name a complete SDXL model as the text_encoder."
            )
        part = other.part(encoders[0] if single and name not in NETWORKS else name)
        if name not in NETWORKS:
            if own is None or self.conditioner is None:
                added = {each: other.parts[each] for each in encoders}
                changed = replace(changed, conditioner=other.conditioner, tokenizer=other.tokenizer)
                return replace(changed, parts={**self.parts, **added})
            part = Part(*part.kind.in_place_of(own.config, part.config, part.state))
            try:
                conditioner = self.conditioner.with_encoders({name: part.config})
            except ConfigError as error:
                raise CheckpointError(f"the parts of {source} do not fit each other: {error}") from None
            changed = replace(changed, conditioner=conditioner, tokenizer=other.tokenizer or self.tokenizer)
        elif part.inferred and own is not None:
            # The denoiser was trained with the scale of its own first stage.
            known = {key: own.state[key] for key in ("latent_mean", "latent_std")}
            part = replace(part, state={**part.state, **known}, inferred=own.inferred)
            part = part.marked_overflowing(getattr(own.config, "overflows_fp16", False))
        changed = replace(changed, diffusion=part.diffusion or self.diffusion)
        return replace(changed, parts={**self.parts, name: part})

    def build(self, dtype: torch.dtype | None = None) -> LatentDiffusion:
        """Build the model in evaluation mode, its parameters frozen, in ``dtype`` (None: as stored), if possible by views.

        Raises:
            CheckpointError: the parts are not a complete model, or a weight is NaN.
        """
        config = self.config()
        if self.tokenizer is None and "text_encoder" in self.parts:
            raise CheckpointError(f"{self.source} has no tokenizer that ldm knows; name a text_encoder that has one.")
        tensors = {f"{name}.{key}": each for name, part in self.parts.items() for key, each in part.state.items()}
        model = build_on_meta(lambda: LatentDiffusion(config, self.tokenizer), tensors, self.source)
        prefixes = part_prefixes(model)
        absent = [name for name in prefixes if name not in self.parts]
        if absent:
            raise CheckpointError(f"{self.source} is not a complete model: it lacks {' and '.join(absent)}.")
        state = joined(self.parts, prefixes)
        fingerprinted = dict(self.fingerprinted) or fingerprinted_metadata(metadata_of(config, self.tokenizer))
        header = Header(config, self.tokenizer, fingerprinted, self.fingerprint, dict(self.provenance))
        return assemble(model, state, header, self.source, dtype)


def part_prefixes(model: LatentDiffusion) -> dict[str, str]:
    """Return the prefix of each component in the model's state dict."""
    return {name: component.prefix for name, component in model.components.items()}


def joined(parts: Mapping[str, Part], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the state dict of a complete model or CLIP from its parts, each under its prefix, and from ``OTHERS``."""
    state = {f"{prefix}.{key}": each for name, prefix in prefixes.items() for key, each in parts[name].state.items()}
    return state | dict(parts[OTHERS].state) if OTHERS in parts else state


def _divided(state: Mapping[str, Tensor], components: Mapping[str, Component], whole: Any) -> dict[str, Part]:
    """Divide a state dict by the prefixes of components; what has no prefix is ``OTHERS``, with the config ``whole``."""
    parts, others = {}, dict(state)
    for name, (prefix, config) in components.items():
        own = [key for key in state if key.startswith(f"{prefix}.")]
        parts[name] = Part(config, {key.removeprefix(f"{prefix}."): others.pop(key) for key in own})
    return parts | ({OTHERS: Part(whole, others)} if others else {})


def of_clip(config: CLIPConfig, state: Mapping[str, Tensor]) -> dict[str, Part]:
    """Return the parts of a CLIP: its encoders, and as ``OTHERS`` the rest, with the config of the CLIP."""
    configs = (replace(config.text, embed_dim=config.embed_dim), config.image)
    encoders = zip(CLIP_COMPONENTS.items(), configs, strict=True)
    return _divided(state, {name: Component(prefix, each) for (name, prefix), each in encoders}, config)


def parts_of(model: LatentDiffusion, target: str) -> dict[str, Part]:
    """Return the parts of a model, for a writer of the format ``target``.

    Raises:
        CheckpointError: it has weights that are in no part.
    """
    parts = _divided(model.state_dict(), model.components, model.config.conditioner)
    if OTHERS in parts:
        raise CheckpointError(
            f"this model has weights that {target} has no place for ({some([*parts[OTHERS].state])}); write a native file."
        )
    return parts


def no_place(target: str, name: str, part: Part) -> CheckpointError:
    """Return the error for a part that a format cannot hold."""
    return CheckpointError(f"{target} has no place for a {part.kind.name} as {name}; write a native file.")


def conditioner_of(parts: Mapping[str, Part], pooled: bool = False, **sdxl: Any) -> ConditionerConfig | None:
    """Return the conditioner that the text encoders of SD and SDXL are part of; None if there are none.

    Args:
        parts: by name; the denoiser's channels show whether it is an inpainting model.
        pooled: field of the conditioner ``text``.
        sdxl: fields of the conditioner ``sdxl``, if there are two text encoders.
    """
    if "text_encoder" not in parts:
        return None
    encoder, (first_stage, denoiser) = parts["text_encoder"].config, (parts.get(name) for name in NETWORKS)
    conditioner: ConditionerConfig = TextConditionerConfig(tower=encoder, pooled=pooled)
    if "text_encoder_2" in parts:
        conditioner = SDXLConditionerConfig(first=encoder, second=parts["text_encoder_2"].config, **sdxl)
    if first_stage and denoiser and denoiser.config.in_channels == 2 * first_stage.config.latent_channels + 1:
        inpaint = InpaintConditionerConfig(latent_channels=first_stage.config.latent_channels)
        return CompositeConditionerConfig({"text": conditioner, "inpaint": inpaint})
    return conditioner


def read_native(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """Read a native file, or a checkpoint of a training: a complete model, or the network of a stage.

    Raises:
        CheckpointError: the file is broken.
    """
    held = metadata["format"]
    header = header_of(metadata, path, CONFIG_BY_FORMAT[held])
    common: dict[str, Any] = {
        "source": str(path),
        "layout": "native",
        "kind": held,
        "tokenizer": header.tokenizer,
        "provenance": header.provenance,
        "fingerprint": header.fingerprint,
        "fingerprinted": header.fingerprinted,
        "notes": ("all settings are from its metadata",),
    }
    if note := training_note(header.provenance):
        common["notes"] += (note,)

    config = header.config
    if held == FIRST_STAGE:  # its latents are measured at the end of the training
        return Checkpoint(parts={"first_stage": Part(config, tensors, inferred=bool(note))}, **common)
    if held == DECODER:
        return Checkpoint(parts={TINY_DECODER: Part(config, tensors)}, **common)
    if held == CLIP:
        return Checkpoint(parts=of_clip(config, tensors), **common)
    conditioner = build_on_meta(lambda: config.conditioner.build(header.tokenizer), tensors, path)
    parts = _divided(tensors, components(config, conditioner), config.conditioner)
    return Checkpoint(
        parts=parts | {"denoiser": parts["denoiser"].trained_for(config.diffusion)},
        conditioner=config.conditioner,
        diffusion=config.diffusion,
        sampling=config.sampling,
        size=config.size,
        **common,
    )
