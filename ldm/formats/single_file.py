"""The single file of latent diffusion: all networks under prefixes, as SD 1.x, SD 2.x and SDXL are passed around.

A file of ours has the whole config in its metadata. Of any other, networks are told from names and shapes; what these
do not say is in this order taken from an argument, from the metadata that some tools write, and from the kind:

|                 | SD 1                      | SD 2                | SDXL                            |
|-----------------|---------------------------|---------------------|---------------------------------|
| told by         | transformers' text tower  | open_clip's         | both                            |
| context         | last state, normed        | penultimate, normed | penultimate of both, not normed |
| latent scale    | 0.18215                   | 0.18215             | 0.13025                         |
| prediction type | eps                       | eps (or v: say so)  | eps (or v: say so)              |
| sampled by      | ddim, 50 steps, scale 7.5 | the same            | euler, 50 steps, scale 5        |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import CLIP_VOCAB_SIZE, CLIPBPEConfig, Tokenizer
from ldm.denoiser import UNetConfig
from ldm.diffusion import Diffusion
from ldm.diffusion.parametrization import Eps, Parametrization, V
from ldm.errors import CheckpointError, unknown
from ldm.formats import infer_config, names
from ldm.formats.checkpoint import Checkpoint, Part, conditioner_of, homes, joined, parts_of, places
from ldm.formats.folding import SCALE, SCALE_SDXL, folded, scale_from, scale_of, with_scale
from ldm.formats.native import MODEL, empty, header_of, meaning, metadata_of
from ldm.formats.tensors import fingerprint, write_tensors
from ldm.model import LatentDiffusion, ModelConfig, SamplingConfig
from ldm.vae import AutoencoderKLConfig

SINGLE_FILE = "ldm.single_file.1"
"""The ``format`` in the metadata of those that we write."""

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OPENAI, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
OPENAI_OF_TWO, OPEN_CLIP_OF_TWO = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PREFIXES = {
    UNET: "unet",
    VAE: "vae",
    OPENAI: "text",
    OPEN_CLIP: "text",
    OPENAI_OF_TWO: "text",
    OPEN_CLIP_OF_TWO: "text_2",
}
"""Which part lies under which prefix."""

LONE = {
    "input_blocks.": UNET,
    "diffusion_model.": "model.",
    "encoder.conv_in.": VAE,
    "text_model.": OPENAI,
    "embeddings.token_embedding.": OPENAI,
    "transformer.resblocks.": OPEN_CLIP,
}
"""How names begin in a file of one network without its prefix."""

EMA = "model_ema."
"""Before the names of averaged weights, whose dots are left out."""

SCALE_FACTOR = "scale_factor"
"""The scale of the latents, where a file has it."""

REFINER = "conditioner.embedders.0.model."
"""Before the names of the one text tower of SDXL's refiner."""

TRAINING = ("model.denoiser.", "first_stage.", "clip.")
"""How names begin in the checkpoints of our own stages."""

LORA = r"[._]lora[._]"
"""A mark of names in a file of LoRA."""

UNREAD = ("position_ids", "logit_scale", "attn_mask")
"""Ends of names that no network of ours needs."""

PREDICTION_TYPES: Mapping[str, type[Parametrization]] = {"epsilon": Eps, "eps": Eps, "v_prediction": V, "v": V}
BY_DEFAULT = "by default; if images come out brown and blurred, say prediction_type='v_prediction'"
SAMPLED = SamplingConfig("ddim", 50, 7.5, "leading", 1, "sigma_min")
SAMPLED_SDXL = SamplingConfig("euler", 50, 5.0, "leading", 1)


class Found(NamedTuple):
    """What lies under a prefix, without it."""

    prefix: str
    tensors: dict[str, Tensor]


def read_single_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    prediction_type: str | None = None,
    ema: bool = True,
) -> Checkpoint:
    """What an LDM file holds: a whole model, or a lone U-Net, autoencoder or text tower with or without its prefix.

    Args:
        path: of the file, for errors.
        tensors, metadata: in it.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``; None = as the file says, else epsilon.
        ema: take averaged weights of the U-Net where the file has both.

    Raises:
        CheckpointError: the file is broken, or holds no such network.
    """
    if metadata.get("format") == SINGLE_FILE:
        return _own(path, tensors, metadata)
    found, unused = _sorted(tensors)
    _refuse_others(path, tensors, found)
    notes = []
    if ema and _average(found, tensors):
        notes.append("the weights of the U-Net are the averaged ones (model_ema)")
    kind = _kind(found)
    notes.append(f"{kind}, since there is " + ", ".join(each.prefix + "*" for each in found.values()))
    parts = {}
    for name, (prefix, own) in found.items():
        config = _recognised(name, prefix, own, path, kind)
        if name == "text" and len(found) > 1:  # its pooled state is not used
            unused += [f"{prefix}{key}" for key in own if key.startswith("text_projection")]
            own = {key: tensor for key, tensor in own.items() if not key.startswith("text_projection")}
            config = replace(config, embed_dim=None)
        parts[name] = _part(name, prefix, config, own, path)
    if "vae" in parts:
        stored = _stored_scale(tensors, path)
        scale = stored or (SCALE_SDXL if kind == "SDXL" else SCALE)
        parts["vae"] = replace(with_scale(parts["vae"], scale), guessed=stored is None)
        notes.append(
            f"the scale of the latents is {scale:g}, as {'the file says' if stored is not None else 'of ' + kind}"
        )
    parametrization, reason = _prediction(prediction_type, tensors, metadata)
    if "unet" in parts:
        parts["unet"] = replace(parts["unet"], guessed=reason is None)
        notes.append(f"the prediction type is {parametrization.kind}, {reason or BY_DEFAULT}")
    side = 1024 if kind == "SDXL" else 768 if kind == "SD 2" and parametrization == V() else 512
    return Checkpoint(
        source=str(path),
        layout="ldm",
        kind=kind,
        parts=parts,
        tokenizer=_tokenizer(parts, kind),
        conditioner=conditioner_of(parts),
        diffusion=Diffusion(parametrization=parametrization),
        sampling=SAMPLED_SDXL if kind == "SDXL" else SAMPLED,
        size=(side, side),
        provenance={"source": path.name},
        notes=tuple(notes),
        unused=tuple(unused),
    )


def _refuse_others(path: Path, tensors: Mapping[str, Tensor], found: Mapping[str, Found]) -> None:
    """Raises a CheckpointError for what may be taken for a model by mistake, saying what it is."""
    if any(name.startswith(REFINER) for name in tensors):
        raise CheckpointError(f"{path} is the refiner of SDXL, which ldm does not read; name the base model.")
    if any(re.search(LORA, name) for name in tensors):
        raise CheckpointError(
            f"{path} is a LoRA, an addition to a model; name a model, and add this to it by Pipeline.load_lora or --lora."
        )
    if path.suffix == ".ckpt" and any(name.startswith(TRAINING) for name in tensors):
        raise CheckpointError(
            f"{path} is a checkpoint of a training, to be resumed; name its run folder, which holds a model after its last stage."
        )
    if not found:
        raise CheckpointError(
            f"{path} holds no network that ldm knows (its first name is {next(iter(tensors), 'none')!r}); "
            "name an SD 1.x, SD 2.x or SDXL checkpoint, or one of ldm."
        )


def write_single_file(path: Path, model: LatentDiffusion, dtype: torch.dtype | None = None) -> str:
    """Write a model as an LDM file with its config in the metadata, and return the fingerprint that it then has.

    Latents whose statistics are per channel are folded into the autoencoder, so that a reader that knows one scale alone
    makes the same images. A text tower of which the last state is the context gets a block more where other readers
    take the last but one.

    Raises:
        CheckpointError: the model has parts that such a file has no place for.
    """
    parts = {name: part.to(dtype) for name, part in parts_of(model, "an LDM file").items()}
    expected = SCALE_SDXL if "text_2" in parts else SCALE
    parts["vae"] = folded(parts["vae"], expected)
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        prefix = _prefix(name, part, parts)
        theirs = names.scatter(part.weights, _table(name, prefix, part.config, part.weights))
        if prefix == OPEN_CLIP and part.config.hidden_state == "last":
            last, extra = (f"transformer.resblocks.{part.config.layers - i}." for i in (1, 0))
            theirs |= {key.replace(last, extra): tensor for key, tensor in theirs.items() if key.startswith(last)}
        tensors |= {prefix + key: tensor for key, tensor in theirs.items()}
    scale = scale_of(parts["vae"])
    if scale != expected:
        tensors[SCALE_FACTOR] = torch.tensor(scale)
    metadata = _metadata(model, parts["vae"])
    metadata["fingerprint"] = fingerprint(
        joined(parts, places(model)), meaning(metadata_of(model.config, model.tokenizer))
    )
    write_tensors(path, tensors, metadata)
    return metadata["fingerprint"]


def _own(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """A file that we wrote: nothing is guessed."""
    header = header_of(metadata, path, ModelConfig)
    config: ModelConfig = header.config
    conditioner = empty(lambda: config.conditioner.build(header.tokenizer), tensors, path)
    found, unused = _sorted(tensors)
    parts = {}
    for name, (_, described) in homes(config, conditioner).items():
        if name not in found:
            raise CheckpointError(f"{path} lacks the {name} that its config describes; get or write it anew.")
        prefix, own = found[name]
        if isinstance(described, TextTowerConfig):
            extra = [key for key in own if key.startswith(f"transformer.resblocks.{described.layers}.")]
            unused += [prefix + key for key in extra]
            own = {key: tensor for key, tensor in own.items() if key not in extra}
        parts[name] = _part(name, prefix, described, own, path)
    try:
        latents = json.loads(metadata["latents"])
        known = {f"latent_{key}": torch.tensor(latents[key]) for key in ("mean", "std", "preview") if latents[key]}
    except Exception as error:  # a file may hold anything
        raise CheckpointError(
            f"the statistics of the latents in {path} cannot be read ({error!r}); get it anew."
        ) from None
    parts["vae"] = replace(parts["vae"], state={**parts["vae"].state, **known})
    return Checkpoint(
        source=str(path),
        layout="ldm",
        kind=_kind(found),
        parts=parts,
        tokenizer=header.tokenizer,
        conditioner=config.conditioner,
        diffusion=config.diffusion,
        sampling=config.sampling,
        size=config.size,
        provenance=header.provenance,
        fingerprint=header.fingerprint,
        meaning={**header.meaning, "format": MODEL},  # it is that of the model
        notes=(
            f"written by ldm, all as its metadata say; the prediction type is {config.diffusion.parametrization.kind}",
        ),
        unused=tuple(unused),
    )


def _metadata(model: LatentDiffusion, vae: Part) -> dict[str, str]:
    """Our own header, and what other tools look for (Stability's model metadata standard)."""
    own, (height, width) = model.first_stage, model.config.size
    preview = vae.state.get("latent_preview")  # one that was only fitted in passing is not saved
    latents = {
        "mean": vae.state["latent_mean"].tolist(),
        "std": vae.state["latent_std"].tolist(),
        "preview": None if preview is None else preview.tolist(),
        "before_folding": {"mean": own.latent_mean.tolist(), "std": own.latent_std.tolist()},
    }
    return metadata_of(model.config, model.tokenizer, SINGLE_FILE) | {
        "latents": json.dumps(latents),
        "provenance": json.dumps(dict(model.provenance)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.prediction_type": "v" if isinstance(model.diffusion.parametrization, V) else "epsilon",
        "modelspec.resolution": f"{width}x{height}",
    }


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Found], list[str]]:
    """Tensors by part, and the names of those that are of none."""
    whole = any(name.startswith(tuple(PREFIXES)) for name in tensors)
    lone = "" if whole else next((LONE[start] for start in LONE for name in tensors if name.startswith(start)), "")
    found: dict[str, Found] = {}
    unused = []
    for name, tensor in tensors.items():
        if name == SCALE_FACTOR:
            continue
        prefix = next((prefix for prefix in PREFIXES if (lone + name).startswith(prefix)), None)
        if prefix is None or name.endswith(UNREAD) or (lone + name).startswith(f"{VAE}loss."):
            unused.append(name)
            continue
        key = (lone + name).removeprefix(prefix)
        if prefix in (OPENAI, OPENAI_OF_TWO) and not key.startswith(("text_model.", "text_projection.")):
            key = f"text_model.{key}"
        found.setdefault(PREFIXES[prefix], Found(prefix, {})).tensors[key] = tensor
    return found, unused


def _average(found: dict[str, Found], tensors: Mapping[str, Tensor]) -> bool:
    """Put the averaged weights in place of the others, where there are any; whether there are."""
    unet = found["unet"].tensors if "unet" in found else {}
    averaged = {name: EMA + f"diffusion_model{name}".replace(".", "") for name in unet}
    there = {name: tensors[key] for name, key in averaged.items() if key in tensors}
    unet.update(there)
    return bool(there)


def _kind(found: Mapping[str, Found]) -> str:
    prefixes = {each.prefix for each in found.values()}
    pooled = "unet" in found and "label_emb.0.0.weight" in found["unet"].tensors and "text" not in found
    if OPEN_CLIP_OF_TWO in prefixes or pooled:
        return "SDXL"
    return "SD 2" if OPEN_CLIP in prefixes else "SD 1" if OPENAI in prefixes else "a lone network"


def _recognised(name: str, prefix: str, tensors: Mapping[str, Tensor], path: Path, kind: str) -> Any:
    """The config of a part of a file that does not say it."""
    if name in ("unet", "vae"):
        return (infer_config.unet if name == "unet" else infer_config.vae)(tensors, path)
    openai = prefix in (OPENAI, OPENAI_OF_TWO)
    tower = (infer_config.text_of_transformers if openai else infer_config.text_of_open_clip)(tensors, path)
    return replace(tower, hidden_state="last" if kind == "SD 1" else "penultimate", context_norm=kind != "SDXL")


def _part(name: str, prefix: str, config: Any, tensors: Mapping[str, Tensor], path: Path) -> Part:
    return Part.gathered(config, tensors, lambda state: _table(name, prefix, config, state), path)


def _table(name: str, prefix: str, config: Any, state: Iterable[str]) -> names.Table:
    if name == "unet":
        return names.unet_ldm(config, state)
    if name == "vae":
        return names.vae_ldm(config, state)
    return (names.text_transformers if prefix in (OPENAI, OPENAI_OF_TWO) else names.tower_open_clip)(state)


def _prefix(name: str, part: Part, parts: Mapping[str, Part]) -> str:
    """Where a part of a model is written.

    Raises:
        CheckpointError: it is a network that an LDM file has no place for.
    """
    if isinstance(part.config, UNetConfig) and name == "unet":
        if part.config.context_width is None and any(level.depth for level in part.config.levels):
            raise CheckpointError(
                "the U-Net of an LDM file attends to a context, which this has not; write a native file."
            )
        return UNET
    if isinstance(part.config, AutoencoderKLConfig):
        return VAE
    if not isinstance(part.config, TextTowerConfig):
        raise CheckpointError(f"an LDM file has no place for the {name} of this model; write a native file.")
    if "text_2" in parts:
        return OPENAI_OF_TWO if name == "text" else OPEN_CLIP_OF_TWO
    return OPENAI if part.config.activation == "quick_gelu" else OPEN_CLIP


def _stored_scale(tensors: Mapping[str, Tensor], path: Path) -> float | None:
    """The scale of the latents that a file says, if it does.

    Raises:
        CheckpointError: what it says is no scale.
    """
    stored = tensors.get(SCALE_FACTOR)
    if stored is None:
        return None
    try:
        return scale_from(stored)
    except ValueError:
        told = stored.flatten()[:3].tolist()
        raise CheckpointError(f"{path}: {SCALE_FACTOR} is {told}, not one number above 0; get the file anew.") from None


def _prediction(
    asked: str | None, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Parametrization, str | None]:
    """What the U-Net estimates, and how that is known: its weights do not tell. None: it is not, and taken for epsilon."""
    told = metadata.get("modelspec.prediction_type", "").lower()
    if asked is not None:
        if asked not in PREDICTION_TYPES:
            raise CheckpointError(unknown("prediction_type", asked, PREDICTION_TYPES))
        return PREDICTION_TYPES[asked](), "as asked for"
    if told in PREDICTION_TYPES:
        return PREDICTION_TYPES[told](), "by the metadata modelspec.prediction_type"
    if "v_pred" in tensors:
        return V(), "by the mark v_pred among the tensors"
    return Eps(), None


def _tokenizer(parts: Mapping[str, Part], kind: str) -> Tokenizer | None:
    if "text" not in parts or parts["text"].config.vocab_size != CLIP_VOCAB_SIZE:
        return None
    return CLIPBPEConfig(parts["text"].config.context_length, pad_id=0 if kind == "SD 2" else None).build()
