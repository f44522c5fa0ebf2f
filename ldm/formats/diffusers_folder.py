"""The folder of a diffusers pipeline: a sub-folder for each part, with its weights and a ``config.json``.

``model_index.json`` names the parts; ``scheduler_config.json`` says prediction type, schedule and how to sample. A folder
of one network has its ``config.json`` and its weights alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.clip.text import TextTowerConfig
from ldm.conditioning.composite import CompositeConditionerConfig
from ldm.conditioning.conditioner import ConditionerConfig
from ldm.conditioning.sdxl import SDXLConditionerConfig
from ldm.conditioning.text import TextConditionerConfig
from ldm.config import from_dict, to_dict
from ldm.denoiser import UNetConfig
from ldm.errors import CheckpointError, ConfigError, first_line
from ldm.formats import configs, names
from ldm.formats.checkpoint import Checkpoint, Part, conditioner_of, parts_of
from ldm.formats.clip import read_text_tower
from ldm.formats.folding import SCALE, folded, scale_from, scale_of, with_scale
from ldm.formats.schedulers import GUIDANCE_SDXL, read_scheduler, write_scheduler
from ldm.formats.tensors import (
    CONFIG,
    DIFFUSERS,
    TRANSFORMERS,
    read_json,
    read_weights,
    write_atomically,
    write_tensors,
)
from ldm.formats.tokenizer import read_tokenizer, tokenizer_class, write_tokenizer
from ldm.model import LatentDiffusion, SamplingConfig
from ldm.vae import AutoencoderKLConfig

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "text_2": "text_encoder_2"}
OLD_ATTENTION = tuple(
    (rf"\b{old}\b", new)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)
"""What the attention of the autoencoder was called before diffusers 0.15."""

OWN, OWN_SETTINGS = "_ldm", ("num_inference_steps", "guidance_scale")
"""An entry of the index that diffusers passes over: what its files have no place for."""

FORCED = {"steps_offset": 1, "clip_sample": False}
"""What diffusers' pipelines with one text tower make of any scheduler that they are given."""


def is_folder(path: Path) -> bool:
    """Whether a folder is a pipeline's, or one network's."""
    return (path / INDEX).is_file() or (path / CONFIG).is_file()


def read_folder(path: Path, prediction_type: str | None = None) -> Checkpoint:
    """What a folder holds: a whole pipeline, or one network.

    Args:
        path: of the folder.
        prediction_type: in place of that of the scheduler's config.

    Raises:
        CheckpointError: a part is missing or broken, or is one that ldm's cannot be.
    """
    if not (path / INDEX).is_file():
        return _lone(path)
    index = read_json(path / INDEX)
    parts, notes = {}, [f"by {INDEX}: {index.get('_class_name', 'no class')}"]
    for name, folder in FOLDERS.items():
        entry = index.get(folder)
        if isinstance(entry, list) and entry and entry[0] is not None:
            if not (path / folder / CONFIG).is_file():
                raise CheckpointError(f"{path} lacks {folder}/{CONFIG}, which its {INDEX} names; get the folder anew.")
            parts[name] = _part(name, path / folder)
    if not parts:
        raise CheckpointError(
            f"{path} is a folder of {index.get('_class_name', 'no pipeline')}, of which ldm reads no part; it reads "
            "pipelines of Stable Diffusion 1.x, 2.x and XL."
        )
    two = "text_2" in parts
    if two:
        parts |= {name: _of_two(name, parts[name]) for name in ("text", "text_2") if name in parts}
    config = read_json(path / "unet" / CONFIG) if "unet" in parts else {}
    scheduler = path / "scheduler" / SCHEDULER
    if not scheduler.is_file():
        raise CheckpointError(f"{path} lacks scheduler/{SCHEDULER}, which says what the U-Net estimates; get it anew.")
    values = read_json(scheduler)
    if not two:
        values |= FORCED
    reason = f"by scheduler/{SCHEDULER}" if "prediction_type" in values else f"by default, {SCHEDULER} says nothing"
    if prediction_type is not None:
        values, reason = {**values, "prediction_type": prediction_type}, "as asked for"
    diffusion, sampling, differing = read_scheduler(values, str(scheduler))
    notes.append(f"the prediction type is {diffusion.parametrization.kind}, {reason}")
    notes += [f"{SCHEDULER}: {sentence}" for sentence in differing.values()]
    factor = parts["vae"].config.factor if "vae" in parts else 8
    size = config.get("sample_size") or (128 if two else 64)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return Checkpoint(
        source=str(path),
        layout="diffusers",
        kind="SDXL" if two else "SD 2" if config.get("use_linear_projection") else "SD 1",
        parts=parts,
        tokenizer=read_tokenizer(path / "tokenizer") if "text" in parts else None,
        conditioner=_conditioner(path, index, config, parts),
        diffusion=diffusion,
        sampling=_asked(path, index, replace(sampling, guidance_scale=GUIDANCE_SDXL) if two else sampling),
        size=(height * factor, width * factor),
        provenance={"source": path.name},
        notes=tuple(notes),
    )


def write_folder(path: Path, model: LatentDiffusion, dtype: torch.dtype | None = None) -> None:
    """Write a model as the folder of a ``StableDiffusionPipeline``, or of SDXL's.

    Latents whose statistics are per channel are folded into the autoencoder. A text tower of which the last state but one
    is the context is written without its last block, as diffusers has that of SD 2. A model whose U-Net also hears the
    pooled state opens by its parts: diffusers has no pipeline that hands it on.

    Raises:
        CheckpointError: the model has parts that such a folder has no place for.
    """
    parts = parts_of(model, "a diffusers folder")
    conditioner = model.config.conditioner
    inner = conditioner.parts.get("text") if isinstance(conditioner, CompositeConditionerConfig) else conditioner
    if not isinstance(inner, TextConditionerConfig | SDXLConditionerConfig):
        raise CheckpointError(
            f"a diffusers folder has no place for the conditioner {conditioner.kind}; write a native file."
        )
    if not isinstance(parts["unet"].config, UNetConfig) or not isinstance(parts["vae"].config, AutoencoderKLConfig):
        raise CheckpointError("a diffusers folder holds a U-Net and an autoencoder; write a native file.")
    two = isinstance(inner, SDXLConditionerConfig)
    parts |= {name: _tower(parts[name], two) for name in ("text", "text_2") if name in parts}
    size_width = inner.size_embedding_width if isinstance(inner, SDXLConditionerConfig) else None
    for name, part in parts.items():
        height, width = model.latent_shape()[1:] if name == "unet" else model.config.size
        write_network(path / FOLDERS[name], name, part.to(dtype), (height, width), size_width)
    scheduler = write_scheduler(model.diffusion, model.config.sampling)
    _write_json(path / "scheduler" / SCHEDULER, scheduler)
    assert model.tokenizer is not None, "what reads text has a tokenizer"
    write_tokenizer(model.tokenizer, path / "tokenizer")
    if isinstance(inner, SDXLConditionerConfig):
        write_tokenizer(model.tokenizer.with_padding(inner.pad_id), path / "tokenizer_2")
    _write_json(path / INDEX, _index(model, inner, parts, scheduler["_class_name"]))


def write_network(
    folder: Path, name: str, part: Part, size: tuple[int, int], size_embedding_width: int | None = None
) -> None:
    """Write a part as a folder that diffusers or transformers opens by itself.

    Args:
        folder: of the part alone.
        name: of the part.
        part: an autoencoder is folded where it has to be.
        size: height and width of what it works on: pixels for an autoencoder, positions of the latent for a U-Net.
        size_embedding_width: of SDXL's U-Net; None: of another, whose vector is then what diffusers calls class labels.

    Raises:
        CheckpointError: diffusers has no such network.
    """
    if name == "unet":
        vector = "class_embedding" if size_embedding_width is None else "add_embedding"
        config = configs.write_unet(part.config, size, vector)
        config |= {} if size_embedding_width is None else {"addition_time_embed_dim": size_embedding_width}
        table = names.unet_diffusers(part.config, part.weights, vector)
    elif name == "vae":
        part = folded(part)
        config = configs.write_vae(part.config, size, scale_of(part) or 1.0)
        table = names.vae_diffusers(part.config, part.weights)
    else:
        config, table = configs.write_text(part.config), names.text_transformers(part.weights)
    stem = TRANSFORMERS[0] if name in ("text", "text_2") else DIFFUSERS
    write_tensors(folder / f"{stem}.safetensors", names.scatter(part.weights, table), {"format": "pt"})
    _write_json(folder / CONFIG, config)


def _index(model: LatentDiffusion, conditioner: Any, parts: Mapping[str, Part], scheduler: str) -> dict[str, Any]:
    """``model_index.json``; written last, since it makes a folder a pipeline."""
    two = isinstance(conditioner, SDXLConditionerConfig)
    painting = "Inpaint" if model.config.conditioner.concat_channels else ""
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if two else ''}{painting}Pipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        OWN: {name: getattr(model.config.sampling, name) for name in OWN_SETTINGS},
    }
    assert model.tokenizer is not None, "what reads text has a tokenizer"
    for name, tokenizer in (("text", "tokenizer"), ("text_2", "tokenizer_2")):
        if name in parts:
            index[tokenizer] = ["transformers", tokenizer_class(model.tokenizer)]
            projected = "WithProjection" if parts[name].config.embed_dim else ""
            index[FOLDERS[name]] = ["transformers", f"CLIPTextModel{projected}"]
    if two:
        return {**index, "force_zeros_for_empty_prompt": conditioner.zeros_for_empty}
    nothing = {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder")}
    return {**index, **nothing, "requires_safety_checker": False}


def _asked(path: Path, index: Mapping[str, Any], sampling: SamplingConfig) -> SamplingConfig:
    """How the model is sampled, with what no file of diffusers says and we have put into the index."""
    own = index.get(OWN, {})
    try:
        return from_dict(SamplingConfig, to_dict(sampling) | {name: own[name] for name in OWN_SETTINGS if name in own})
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"{path / INDEX}: {OWN} does not say how to sample ({first_line(error)}); remove it."
        ) from None


def _conditioner(
    path: Path, index: Mapping[str, Any], unet: Mapping[str, Any], parts: Mapping[str, Part]
) -> ConditionerConfig | None:
    pooled = unet.get("class_embed_type") == "projection"
    if "text_2" not in parts:
        return conditioner_of(parts, pooled)
    try:
        return conditioner_of(
            parts,
            pad_id=read_tokenizer(path / "tokenizer_2").pad_id,
            zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True)),
            size_embedding_width=unet.get("addition_time_embed_dim", 256),
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the text encoders of {path} do not fit each other: {first_line(error)}.") from None


def _part(name: str, folder: Path) -> Part:
    """A network of a folder, a text tower's context as it is by itself: the last state, normed."""
    values, where = read_json(folder / CONFIG), folder / CONFIG
    if name in ("text", "text_2"):
        return read_text_tower(values, folder)
    tensors, files = read_weights(folder)
    if name == "unet":
        config: Any = configs.read_unet(values, where)
        vector = "class_embedding" if values.get("class_embed_type") else "add_embedding"
        return Part.gathered(config, tensors, lambda state: names.unet_diffusers(config, state, vector), files[0])
    config = configs.read_vae(values, where)
    tensors = {names.renamed(key, OLD_ATTENTION): tensor for key, tensor in tensors.items()}
    part = Part.gathered(config, tensors, lambda state: names.vae_diffusers(config, state), files[0])
    return _with_statistics(part, values, where)


def _with_statistics(part: Part, values: Mapping[str, Any], where: Path) -> Part:
    """An autoencoder with the statistics of its latents: z = normalised * std / scaling_factor + mean."""
    try:
        part = with_scale(part, scale_from(values.get("scaling_factor", SCALE)))
        state = dict(part.state)
        if values.get("latents_std") is not None:
            state["latent_std"] = state["latent_std"] * torch.tensor(values["latents_std"], dtype=torch.float32)
        mean = values.get("latents_mean") or [values.get("shift_factor") or 0.0] * part.config.latent_channels
        state["latent_mean"] = torch.tensor(mean, dtype=torch.float32)
    except Exception as error:  # a file may hold anything
        raise CheckpointError(f"{where} does not say how latents are normalised: {first_line(error)}.") from None
    return replace(part, state=state)


def _lone(path: Path) -> Checkpoint:
    """A folder of a U-Net or of an autoencoder."""
    said, known = read_json(path / CONFIG).get("_class_name"), {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
    if said not in known:
        raise CheckpointError(
            f"{path / CONFIG} is of {said or 'no class'}; ldm reads folders of {', '.join(known)}, CLIP, and whole pipelines."
        )
    parts = {known[said]: _part(known[said], path)}
    return Checkpoint(str(path), "diffusers", "a lone network", parts, notes=(f"by {CONFIG}: {said}",))


def _of_two(name: str, part: Part) -> Part:
    """A tower as SDXL reads it: the last state but one, not normed; of the first, no pooled state."""
    state = {key: tensor for key, tensor in part.state.items() if name == "text_2" or key != "projection.weight"}
    embed_dim = part.config.embed_dim if name == "text_2" else None
    return Part(replace(part.config, hidden_state="penultimate", context_norm=False, embed_dim=embed_dim), state)


def _tower(part: Part, two: bool) -> Part:
    """A tower as diffusers' pipelines are going to read it.

    Raises:
        CheckpointError: they cannot read it so that the context is the same.
    """
    config: TextTowerConfig = part.config
    if two == config.context_norm or (two and config.hidden_state == "last"):
        raise CheckpointError(
            f"diffusers' pipelines with {'two text towers' if two else 'one text tower'} cannot read the {config.hidden_state} "
            f"hidden state {'with' if config.context_norm else 'without'} the final norm; write a native or an LDM file."
        )
    if two or config.hidden_state == "last":
        return part
    if config.embed_dim:
        raise CheckpointError(
            "the context is the last hidden state but one, and the pooled state that of the last, which diffusers' pipelines "
            "with one text tower cannot read; write a native or an LDM file."
        )
    last = f"blocks.{config.layers - 1}."
    state = {key: tensor for key, tensor in part.state.items() if not key.startswith(last)}
    return Part(replace(config, layers=config.layers - 1, hidden_state="last"), state)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
