"""The folder of a diffusers pipeline: a sub-folder for each component, with its weights and a ``config.json``.

``model_index.json`` names the components; ``scheduler_config.json`` holds prediction type, schedule and sampling settings. A
folder of one network has only its ``config.json`` and its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.config import from_dict, to_dict
from ldm.errors import CheckpointError, ConfigError, first_line
from ldm.formats.checkpoint import Checkpoint, Part, conditioner_of, no_place, parts_of
from ldm.formats.network_folder import (
    NetworkFiles,
    folder_formats,
    network_files,
    read_network,
    read_network_folder,
)
from ldm.formats.pipelines import PIPELINES, StableDiffusion
from ldm.formats.schedulers import read_scheduler, write_scheduler
from ldm.formats.tensors import CONFIG, INDEX, check_writable, read_json, write_json
from ldm.formats.tokenizer import read_tokenizer, tokenizer_class, write_tokenizer
from ldm.model import LatentDiffusion, SamplingConfig
from ldm.nn.network_format import FolderFormat, Values

SCHEDULER = "scheduler_config.json"
"""Config file of the scheduler, in the folder ``scheduler``."""

OWN, OWN_SETTINGS = "_ldm", ("num_inference_steps", "guidance_scale")
"""Entry of the index for settings that diffusers' files have no place for; diffusers ignores it."""


def is_folder(path: Path) -> bool:
    """Return whether a folder holds a pipeline or one network."""
    return (path / INDEX).is_file() or (path / CONFIG).is_file()


def folders() -> dict[str, list[FolderFormat]]:
    """Return the descriptions of components, by the name of their folder in a pipeline."""
    found: dict[str, list[FolderFormat]] = {}
    for form in folder_formats():
        for folder in form.folders:
            found.setdefault(folder, []).append(form)
    return found


def read_folder(path: Path, prediction_type: str | None = None, variant: str | None = None) -> Checkpoint:
    """Read a folder: a complete pipeline, or one network.

    Args:
        path: the folder.
        prediction_type: overrides that of the scheduler's config.
        variant: variant of the weights that is read where a component has it, such as ``fp16``.

    Raises:
        CheckpointError: a component is missing, broken, or not supported by ldm.
    """
    if not (path / INDEX).is_file():
        return read_network_folder(path, variant)
    index = read_json(path / INDEX)
    parts: dict[str, Part] = {}
    values: dict[str, Values] = {}
    notes = [f"by {INDEX}: {index.get('_class_name', 'no class')}"]
    for folder, forms in folders().items():
        entry = index.get(folder)
        if isinstance(entry, list) and entry and entry[0] is not None:
            if not (path / folder / CONFIG).is_file():
                raise CheckpointError(
                    f"{path} lacks {folder}/{CONFIG}, which its {INDEX} names; download the folder again."
                )
            form = next((form for form in forms if entry[-1] in form.classes), forms[0])
            parts[form.folders[folder]], values[form.folders[folder]] = read_network(path / folder, form, variant)
    if not parts:
        raise CheckpointError(
            f"{path} is a folder of {index.get('_class_name', 'no pipeline')}, of which ldm reads no part; use one of the "
            "pipelines Stable Diffusion 1.x, 2.x and XL."
        )
    pipeline = next((each for each in PIPELINES if parts.keys() >= each.encoders.keys()), PIPELINES[-1])
    for name in pipeline.encoders.keys() & parts.keys():
        assumed = {**pipeline.encoders[name], **pipeline.unread.get(name, {})}
        parts[name] = parts[name].with_config(**assumed)
    denoiser = values.get("denoiser", {})
    diffusion, sampling, scheduler_notes = _read_scheduler(path, pipeline, prediction_type)
    if "denoiser" in parts:
        parts["denoiser"] = parts["denoiser"].trained_for(diffusion)
    factor = parts["first_stage"].config.factor if "first_stage" in parts else 8
    size = denoiser.get("sample_size") or pipeline.latent_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return Checkpoint(
        source=str(path),
        layout="diffusers",
        kind=pipeline.family(denoiser),
        parts=parts,
        tokenizer=read_tokenizer(path / "tokenizer") if pipeline.encoders.keys() & parts.keys() else None,
        conditioner=_conditioner(path, index, denoiser, parts, pipeline),
        diffusion=diffusion,
        sampling=_with_own(path, index, pipeline.sampling(sampling)),
        size=(height * factor, width * factor),
        provenance={"source": path.name},
        notes=(*notes, *scheduler_notes),
    )


def write_folder(path: Path, model: LatentDiffusion, dtype: torch.dtype | None = None) -> None:
    """Write a model as the folder of a ``StableDiffusionPipeline``, or of SDXL's.

    Latents whose statistics are per channel are folded into the first stage. A text encoder whose penultimate hidden state
    is the context is written without its last block, as diffusers does for SD 2. A model whose denoiser also takes the
    pooled state can only be loaded by component: diffusers has no pipeline that passes that state on.

    Raises:
        CheckpointError: the model has parts that such a folder has no place for, or values that could not be read again. Then
            nothing is written.
    """
    parts = parts_of(model, "a diffusers folder")
    conditioner = model.config.conditioner
    inner = getattr(conditioner, "parts", {"text": conditioner}).get("text")
    pipeline = next((each for each in PIPELINES if type(inner) is each.conditioner), None)
    if pipeline is None:
        raise CheckpointError(
            f"a diffusers folder has no place for the conditioner {conditioner.kind}; write a native file."
        )
    forms = {name: _placed(name, part) for name, part in parts.items()}
    for name, assumed in pipeline.encoders.items():
        form, part = forms[name][1], parts[name]
        parts[name] = Part(*form.fitted(part.config, part.state, assumed))
    extra = pipeline.component_values(inner)
    networks: dict[str, NetworkFiles] = {}
    for name, part in parts.items():
        folder, form = forms[name]
        size = model.latent_shape()[1:] if form.sized_in_latents else model.config.size
        networks[folder] = network_files(form, part.to(dtype), size, extra.get(name))
    scheduler = write_scheduler(model.diffusion, model.config.sampling)
    assert model.tokenizer is not None, "a conditioner that reads text has a tokenizer"
    tokenizers = pipeline.tokenizers(model.tokenizer, inner)
    index = {
        "_class_name": f"{pipeline.name}{'Inpaint' if conditioner.concat_channels else ''}Pipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        OWN: {name: getattr(model.config.sampling, name) for name in OWN_SETTINGS},
        **{folder: [form.library, form.class_name(parts[name].config)] for name, (folder, form) in forms.items()},
        **{folder: ["transformers", tokenizer_class(model.tokenizer)] for folder in tokenizers},
        **pipeline.index_values(inner),
    }
    for folder, files in networks.items():  # before any is written
        check_writable(files.tensors, path / folder)
    for folder, files in networks.items():
        files.write(path / folder, checked=True)
    write_json(path / "scheduler" / SCHEDULER, scheduler, sort_keys=True)
    for folder, tokenizer in tokenizers.items():
        write_tokenizer(tokenizer, path / folder)
    write_json(path / INDEX, index, sort_keys=True)  # the last file, since it makes the folder a pipeline


def _placed(name: str, part: Part) -> tuple[str, FolderFormat]:
    """Return the folder of a component, and the format description by which it is written.

    Raises:
        CheckpointError: diffusers has no place for it.
    """
    for form in part.kind.folders:
        for folder, component in form.folders.items():
            if component == name:
                return folder, form
    raise no_place("a diffusers folder", name, part)


def _read_scheduler(path: Path, pipeline: StableDiffusion, prediction_type: str | None) -> Any:
    """Return schedule and parametrization, defaults of sampling, and notes on both."""
    file = path / "scheduler" / SCHEDULER
    if not file.is_file():
        raise CheckpointError(
            f"{path} lacks scheduler/{SCHEDULER}, which holds the prediction type; download the folder again."
        )
    values = pipeline.scheduler_values(read_json(file))
    reason = f"by scheduler/{SCHEDULER}" if "prediction_type" in values else f"by default, {SCHEDULER} has none"
    if prediction_type is not None:
        values, reason = {**values, "prediction_type": prediction_type}, "as requested"
    diffusion, sampling, differing = read_scheduler(values, str(file))
    notes = [f"the prediction type is {diffusion.parametrization.kind}, {reason}"]
    return diffusion, sampling, notes + [f"{SCHEDULER}: {sentence}" for sentence in differing.values()]


def _with_own(path: Path, index: Mapping[str, Any], sampling: SamplingConfig) -> SamplingConfig:
    """Return the defaults of sampling with the settings that ldm wrote into the index."""
    own = index.get(OWN, {})
    try:
        return from_dict(SamplingConfig, to_dict(sampling) | {name: own[name] for name in OWN_SETTINGS if name in own})
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"{path / INDEX}: {OWN} has invalid sampling settings ({first_line(error)}); remove it."
        ) from None


def _conditioner(
    path: Path, index: Values, denoiser: Values, parts: Mapping[str, Part], pipeline: StableDiffusion
) -> Any:
    if not parts.keys() >= pipeline.encoders.keys():
        return None
    try:
        return conditioner_of(parts, **pipeline.conditioner_fields(path, index, denoiser))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the text encoders of {path} do not fit each other: {first_line(error)}.") from None
