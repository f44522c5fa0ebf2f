"""What a file or folder of any format holds, under our names: parts, and what they mean together.

Readers of a format make a :class:`Checkpoint`, writers take one; between them lies :class:`LatentDiffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning import ConditionerKind
from ldm.conditioning.inpaint import InpaintConditionerConfig
from ldm.conditioning.sdxl import SDXLConditionerConfig
from ldm.conditioning.several import SeveralConditionersConfig
from ldm.conditioning.text import TextConditionerConfig
from ldm.diffusion.parametrization import Diffusion
from ldm.errors import CheckpointError, ConfigError
from ldm.formats.native import (
    CLIP,
    FIRST_STAGE,
    HELD,
    Header,
    assemble,
    empty,
    meaning,
    metadata_of,
    read_header,
)
from ldm.formats.tensors import read_metadata, read_tensors, to_dtype
from ldm.model import LatentDiffusion, ModelConfig, SamplingConfig

PARTS = {"vae": "first_stage", "unet": "denoiser"}
"""Parts by the names that diffusers' pipelines have for them, and where they are in a LatentDiffusion; others are towers."""

OTHERS = "others"
"""The part of a native file that no other format has a place for, under the names of the whole model."""

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
        parts: ``vae``, ``unet``, and the towers as :meth:`Conditioner.towers` names them: ``text``, ``text_2``.
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
    conditioner: ConditionerKind | None = None
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
        state = {
            f"{prefix}.{key}": each for name, prefix in prefixes.items() for key, each in self.parts[name].state.items()
        }
        state |= self.parts[OTHERS].state if OTHERS in self.parts else {}
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


def _with_tower(conditioner: ConditionerKind, name: str, tower: TextTowerConfig) -> ConditionerKind:
    """The conditioner with another config of a text tower."""
    if isinstance(conditioner, SeveralConditionersConfig):
        return replace(
            conditioner, parts={key: _with_tower(part, name, tower) for key, part in conditioner.parts.items()}
        )
    if isinstance(conditioner, SDXLConditionerConfig):
        return replace(conditioner, second=tower) if name == "text_2" else replace(conditioner, first=tower)
    return replace(conditioner, tower=tower) if isinstance(conditioner, TextConditionerConfig) else conditioner


def places(model: LatentDiffusion) -> dict[str, str]:
    """Parts of a model, and the prefix of each in the model's state."""
    names = {module: name for name, module in model.named_modules()}
    towers = {part: names[tower] for part, tower in model.conditioner.towers()}
    return PARTS | towers


def _configs(model: LatentDiffusion) -> dict[str, Any]:
    """Of the parts of a model."""
    towers = {name: tower.config for name, tower in model.conditioner.towers()}
    return {"vae": model.config.first_stage, "unet": model.config.denoiser, **towers}


def parts_of(model: LatentDiffusion, target: str) -> dict[str, Part]:
    """The parts of a model, for a writer of the format ``target``.

    Raises:
        CheckpointError: it has weights that are in none of them.
    """
    described = _configs(model)
    parts = {
        name: Part(described[name], model.get_submodule(prefix).state_dict()) for name, prefix in places(model).items()
    }
    known = {f"{prefix}.{key}" for name, prefix in places(model).items() for key in parts[name].state}
    others = [name for name in model.state_dict() if name not in known]
    if others:
        raise CheckpointError(
            f"this model has weights that {target} has no place for ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); write a native file."
        )
    return parts


def with_scale(part: Part, scale: float) -> Part:
    """An autoencoder with the one factor that normalises its latents."""
    channels = part.config.latent_channels
    statistics = {"latent_mean": torch.zeros(channels), "latent_std": torch.full((channels,), 1 / scale)}
    return replace(part, state={**part.state, **statistics})


def conditioner_of(parts: Mapping[str, Part], pooled: bool = False, **sdxl: Any) -> ConditionerKind | None:
    """What the towers among the parts are together; the U-Net's channels tell one for inpainting.

    Args:
        parts: by name.
        pooled: of the conditioner ``text``.
        sdxl: settings of the conditioner ``sdxl``, if there are two towers.
    """
    if "text" not in parts:
        return None
    tower, vae, unet = parts["text"].config, parts.get("vae"), parts.get("unet")
    conditioner: ConditionerKind = TextConditionerConfig(tower=tower, pooled=pooled)
    if "text_2" in parts:
        conditioner = SDXLConditionerConfig(first=tower, second=parts["text_2"].config, **sdxl)
    if vae and unet and unet.config.in_channels == 2 * vae.config.latent_channels + 1:
        inpaint = InpaintConditionerConfig(latent_channels=vae.config.latent_channels)
        return SeveralConditionersConfig({"text": conditioner, "inpaint": inpaint})
    return conditioner


def read_native(path: Path) -> Checkpoint:
    """What a file of our own format holds: a whole model, a first stage or a CLIP.

    Raises:
        CheckpointError: the file is broken, or a model in it has weights that are of no part.
    """
    held = read_metadata(path).get("format", "")
    header, tensors = read_header(path, held, HELD[held]), read_tensors(path)
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

    def under(prefix: str, config: Any) -> Part:
        start = f"{prefix}." if prefix else ""
        return Part(config, {name[len(start) :]: each for name, each in tensors.items() if name.startswith(start)})

    if held == FIRST_STAGE:
        return Checkpoint(parts={"vae": under("", header.config)}, **common)
    config = header.config
    if held == CLIP:
        parts = {
            "text": under("text", replace(config.text, embed_dim=config.embed_dim)),
            "image": under("image", config.image),
        }
        others = {name: each for name, each in tensors.items() if not name.startswith(("text.", "image."))}
        return Checkpoint(parts=parts | {OTHERS: Part(config, others)}, **common)
    model = empty(lambda: LatentDiffusion(config, header.tokenizer), tensors, path)
    described = _configs(model)
    parts = {name: under(prefix, described[name]) for name, prefix in places(model).items()}
    known = {f"{prefix}.{key}" for name, prefix in places(model).items() for key in parts[name].state}
    others = {name: tensor for name, tensor in tensors.items() if name not in known}
    return Checkpoint(
        parts=parts | ({OTHERS: Part(config.conditioner, others)} if others else {}),
        conditioner=config.conditioner,
        diffusion=config.diffusion,
        sampling=config.sampling,
        size=config.size,
        **common,
    )
