"""What a file or folder of any format holds, under our names: parts, and what they mean together.

Readers of a format make a :class:`Checkpoint`, writers take one; between them lies :class:`LatentDiffusion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.clip.model import CLIPConfig
from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.conditioning.composite import CompositeConditionerConfig
from ldm.conditioning.inpaint import InpaintConditionerConfig
from ldm.conditioning.sdxl import SDXLConditionerConfig
from ldm.conditioning.text import TextConditionerConfig
from ldm.diffusion.parametrization import Diffusion
from ldm.errors import CheckpointError, ConfigError, some
from ldm.formats import names
from ldm.formats.native import (
    CLIP,
    FIRST_STAGE,
    HELD,
    Header,
    assemble,
    empty,
    header_of,
    meaning,
    metadata_of,
)
from ldm.formats.tensors import to_dtype
from ldm.model import LatentDiffusion, ModelConfig, SamplingConfig

PARTS = {"vae": "first_stage", "unet": "denoiser"}
"""Parts by the names that diffusers' pipelines have for them, and where they are in a LatentDiffusion; others are towers."""

OTHERS = "others"
"""What is in no other part, under the names of the whole model or CLIP."""

NOT_OF_THE_NETWORK = ("latent_mean", "latent_std", "latent_preview")
"""What the state of a first stage has beside weights; formats say it in ways of their own."""


@dataclass(frozen=True)
class Part:
    """A network: its config, and its state under our names.

    ``guessed`` if its source does not say how the latents are scaled (VAE), or what is estimated (U-Net).
    """

    config: Any
    state: Mapping[str, Tensor]
    guessed: bool = False

    @classmethod
    def gathered(
        cls, config: Any, tensors: Mapping[str, Tensor], table: Callable[[Iterable[str]], names.Table], source: object
    ) -> Part:
        """The network of a config whose weights are foreign ``tensors``, by views; see :func:`ldm.formats.names.gather`.

        ``table`` makes the table out of the names of ours.
        """
        wanted = cls(config, empty(config.build, tensors, source).state_dict()).weights
        return cls(config, names.gather(tensors, table(wanted), wanted, source))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state without the statistics of the latents."""
        return {name: tensor for name, tensor in self.state.items() if name not in NOT_OF_THE_NETWORK}

    def to(self, dtype: torch.dtype | None) -> Part:
        """With weights in ``dtype``; the statistics of the latents stay as they are."""
        return replace(
            self, state={**self.state, **{name: to_dtype(each, dtype) for name, each in self.weights.items()}}
        )

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(tensor.numel() for tensor in self.weights.values())


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds; a lone network is a checkpoint of one part.

    Attributes:
        source: where it comes from, for errors.
        layout: ``native``, ``ldm`` (single file), ``diffusers``, ``transformers`` or ``open_clip``.
        kind: what it was taken for, such as ``SD 1``.
        parts: ``vae``, ``unet``, and the towers as :meth:`Conditioner.pretrained_encoders` names them: ``text``, ``text_2``.
        conditioner: what the towers are part of.
        fingerprint, meaning: that it was written with, and what that covers beside the weights; empty for none.
        notes: how things were told that the weights do not say, a sentence each.
        unused: names that were found and that nothing needs.
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
    meaning: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def config(self) -> ModelConfig:
        """Of the whole model.

        Raises:
            CheckpointError: a part is missing, or the parts do not fit each other.
        """
        absent = self.missing()
        if absent or self.conditioner is None:
            raise CheckpointError(
                f"{self.source} is no whole model: it lacks {' and '.join(absent)}; name one that has "
                f"{'it' if len(absent) == 1 else 'them'} ({', '.join(f'{name}=...' for name in absent)})."
            )
        try:
            return ModelConfig(
                first_stage=self.parts["vae"].config,
                conditioner=self.conditioner,
                denoiser=self.parts["unet"].config,
                diffusion=self.diffusion or Diffusion(),
                size=self.size or (512, 512),
                sampling=self.sampling,
            )
        except ConfigError as error:
            raise CheckpointError(f"the parts of {self.source} do not fit each other: {error}") from None

    def part(self, name: str) -> Part:
        """A part, by its name.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self.parts:
            held = " and ".join(each for each in self.parts if each != OTHERS)
            raise CheckpointError(
                f"{self.source} holds no {name}, but {held or 'nothing that ldm knows'}; name another source."
            )
        return self.parts[name]

    def towers(self) -> list[str]:
        """Names of the parts that encode conditions."""
        return [name for name in self.parts if name not in (*PARTS, OTHERS)]

    def missing(self) -> list[str]:
        """What a whole model has and this lacks, by the names of :func:`ldm.load`'s arguments."""
        return [name for name in PARTS if name not in self.parts] + ["text_encoder"] * (self.conditioner is None)

    def with_part(self, name: str, other: Checkpoint) -> Checkpoint:
        """The checkpoint with a part of another one in place of its own.

        Raises:
            CheckpointError: the other has no such part.
        """
        lone = name == "text_2" and other.towers() == ["text"]
        part, own = other.part("text" if lone else name), self.parts.get(name)
        source = f"{self.source} with the {name} of {other.source}"
        changed = replace(self, source=source, fingerprint="", meaning={})
        if isinstance(part.config, TextTowerConfig):
            if own is None and name == "text_2":
                raise CheckpointError(
                    f"{self.source} has no second text encoder; name a whole model of SDXL as the text_encoder."
                )
            if own is None or self.conditioner is None:
                return replace(
                    changed,
                    parts={**self.parts, **{each: other.parts[each] for each in other.towers()}},
                    conditioner=other.conditioner,
                    tokenizer=other.tokenizer,
                )
            part = _read_as(own.config, part)
            try:
                conditioner = _with_tower(self.conditioner, name, part.config)
            except ConfigError as error:
                raise CheckpointError(f"the parts of {source} do not fit each other: {error}") from None
            changed = replace(changed, conditioner=conditioner, tokenizer=other.tokenizer or self.tokenizer)
        elif name == "vae" and part.guessed and own is not None:
            # The U-Net was trained with the scale of its own autoencoder.
            known = {key: own.state[key] for key in ("latent_mean", "latent_std")}
            part = replace(part, state={**part.state, **known}, guessed=own.guessed)
        if name == "unet" and other.diffusion is not None and not part.guessed:
            changed = replace(changed, diffusion=other.diffusion)
        return replace(changed, parts={**self.parts, name: part})

    def build(self, dtype: torch.dtype | None = None) -> LatentDiffusion:
        """The model, in evaluation mode, its parameters frozen, in ``dtype`` (None: as stored) and without copies if it can.

        Raises:
            CheckpointError: the parts are no whole model, or a weight is NaN.
        """
        config = self.config()
        if self.tokenizer is None and "text" in self.parts:
            raise CheckpointError(f"{self.source} has no tokenizer that ldm knows; name a text_encoder that has one.")
        tensors = {f"{name}.{key}": each for name, part in self.parts.items() for key, each in part.state.items()}
        model = empty(lambda: LatentDiffusion(config, self.tokenizer), tensors, self.source)
        prefixes = places(model)
        absent = [name for name in prefixes if name not in self.parts]
        if absent:
            raise CheckpointError(f"{self.source} is no whole model: it lacks {' and '.join(absent)}.")
        state = joined(self.parts, prefixes)
        meant = dict(self.meaning) or meaning(metadata_of(config, self.tokenizer))
        header = Header(config, self.tokenizer, meant, self.fingerprint, dict(self.provenance))
        return assemble(model, state, header, self.source, dtype)


def _read_as(own: TextTowerConfig, part: Part) -> Part:
    """A text tower in place of ``own``: what of it the U-Net attends to is what the U-Net was trained with.

    That is a number of blocks, which SD 2 has as all but the last of 24 in an LDM file, and as all of 23 in a folder.
    """
    tower: TextTowerConfig = part.config
    attended = own.layers - (own.hidden_state == "penultimate")
    hidden_state = {attended: "last", attended + 1: "penultimate"}.get(tower.layers, own.hidden_state)
    projected = own.embed_dim is not None
    read: Any = {"hidden_state": hidden_state, "context_norm": own.context_norm}
    return Part(
        replace(tower, **read, embed_dim=tower.embed_dim if projected else None),
        {key: tensor for key, tensor in part.state.items() if projected or key != "projection.weight"},
    )


def _with_tower(conditioner: ConditionerConfig, name: str, tower: TextTowerConfig) -> ConditionerConfig:
    """The conditioner with another config of a text tower."""
    if isinstance(conditioner, CompositeConditionerConfig):
        return replace(
            conditioner, parts={key: _with_tower(part, name, tower) for key, part in conditioner.parts.items()}
        )
    if isinstance(conditioner, SDXLConditionerConfig):
        return replace(conditioner, second=tower) if name == "text_2" else replace(conditioner, first=tower)
    return replace(conditioner, tower=tower) if isinstance(conditioner, TextConditionerConfig) else conditioner


def homes(config: ModelConfig, conditioner: Conditioner) -> dict[str, tuple[str, Any]]:
    """Parts of a model: the prefix of each in the model's state, and its config."""
    modules = {module: f"conditioner.{name}" for name, module in conditioner.named_modules()}
    towers = {part: (modules[tower], tower.config) for part, tower in conditioner.pretrained_encoders()}
    return {"vae": (PARTS["vae"], config.first_stage), "unet": (PARTS["unet"], config.denoiser), **towers}


def places(model: LatentDiffusion) -> dict[str, str]:
    """Parts of a model, and the prefix of each in the model's state."""
    return {part: prefix for part, (prefix, _) in homes(model.config, model.conditioner).items()}


def joined(parts: Mapping[str, Part], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The state of a whole out of the parts in these places, and of ``OTHERS``."""
    state = {f"{prefix}.{key}": each for name, prefix in prefixes.items() for key, each in parts[name].state.items()}
    return state | dict(parts[OTHERS].state) if OTHERS in parts else state


def _divided(state: Mapping[str, Tensor], places: Mapping[str, tuple[str, Any]], whole: Any) -> dict[str, Part]:
    """Parts by their prefix in a state and their config; what is under no prefix is of ``OTHERS``, and the config ``whole``."""
    parts, others = {}, dict(state)
    for name, (prefix, config) in places.items():
        own = [key for key in state if key.startswith(f"{prefix}.")]
        parts[name] = Part(config, {key.removeprefix(f"{prefix}."): others.pop(key) for key in own})
    return parts | ({OTHERS: Part(whole, others)} if others else {})


def of_clip(config: CLIPConfig, state: Mapping[str, Tensor]) -> dict[str, Part]:
    """The parts of a CLIP: its towers, and as ``OTHERS`` what is in neither, with its config."""
    text = replace(config.text, embed_dim=config.embed_dim)
    return _divided(state, {"text": ("text", text), "image": ("image", config.image)}, config)


def parts_of(model: LatentDiffusion, target: str) -> dict[str, Part]:
    """The parts of a model, for a writer of the format ``target``.

    Raises:
        CheckpointError: it has weights that are in none of them.
    """
    parts = _divided(model.state_dict(), homes(model.config, model.conditioner), model.config.conditioner)
    if OTHERS in parts:
        raise CheckpointError(
            f"this model has weights that {target} has no place for ({some([*parts[OTHERS].state])}); write a native file."
        )
    return parts


def conditioner_of(parts: Mapping[str, Part], pooled: bool = False, **sdxl: Any) -> ConditionerConfig | None:
    """What the towers among the parts are together; the U-Net's channels tell one for inpainting.

    Args:
        parts: by name.
        pooled: of the conditioner ``text``.
        sdxl: settings of the conditioner ``sdxl``, if there are two towers.
    """
    if "text" not in parts:
        return None
    tower, vae, unet = parts["text"].config, parts.get("vae"), parts.get("unet")
    conditioner: ConditionerConfig = TextConditionerConfig(tower=tower, pooled=pooled)
    if "text_2" in parts:
        conditioner = SDXLConditionerConfig(first=tower, second=parts["text_2"].config, **sdxl)
    if vae and unet and unet.config.in_channels == 2 * vae.config.latent_channels + 1:
        inpaint = InpaintConditionerConfig(latent_channels=vae.config.latent_channels)
        return CompositeConditionerConfig({"text": conditioner, "inpaint": inpaint})
    return conditioner


def read_native(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """What a file of our own format holds: a whole model, a first stage or a CLIP.

    Raises:
        CheckpointError: the file is broken.
    """
    held = metadata["format"]
    header = header_of(metadata, path, HELD[held])
    common: dict[str, Any] = {
        "source": str(path),
        "layout": "native",
        "kind": held,
        "tokenizer": header.tokenizer,
        "provenance": header.provenance,
        "fingerprint": header.fingerprint,
        "meaning": header.meaning,
        "notes": ("all as its metadata say",),
    }

    config = header.config
    if held == FIRST_STAGE:
        return Checkpoint(parts={"vae": Part(config, tensors)}, **common)
    if held == CLIP:
        return Checkpoint(parts=of_clip(config, tensors), **common)
    conditioner = empty(lambda: config.conditioner.build(header.tokenizer), tensors, path)
    return Checkpoint(
        parts=_divided(tensors, homes(config, conditioner), config.conditioner),
        conditioner=config.conditioner,
        diffusion=config.diffusion,
        sampling=config.sampling,
        size=config.size,
        **common,
    )
