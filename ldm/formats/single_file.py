"""The single file of latent diffusion: all networks under prefixes, as SD 1.x, SD 2.x and SDXL are distributed.

A file that ldm wrote has the complete config in its metadata. For any other, networks are recognized by names and shapes; what
these do not determine is taken, in this order, from an argument, from the metadata that some tools write, and from the
family of models (:mod:`ldm.formats.families`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.diffusion.parametrization import V
from ldm.errors import CheckpointError
from ldm.formats.checkpoint import (
    CONTROLNET,
    NETWORKS,
    Checkpoint,
    Part,
    conditioner_of,
    joined,
    no_place,
    part_prefixes,
    parts_of,
)
from ldm.formats.families import SD_1, Family, assumed, family_of, tokenizer_of
from ldm.formats.folding import (
    SCALE,
    SCALE_FACTOR,
    SCALE_SDXL,
    folded,
    has_statistics,
    scale_and_shift_of,
    with_scale,
)
from ldm.formats.marks import Marks, metadata_for, names_of, read_marks, statistics_for, tensors_for, without_marks
from ldm.formats.native import MODEL, build_on_meta, fingerprinted_metadata, header_of, metadata_of
from ldm.formats.single_file_networks import EMA, full_names, networks_in, reject_other_files, with_ema
from ldm.formats.tensors import fingerprint, write_tensors
from ldm.model import LatentDiffusion, ModelConfig, components
from ldm.nn.network_format import SingleFileFormat, Values

SINGLE_FILE = "ldm.single_file.1"
"""``format`` in the metadata of the files that ldm writes."""


def read_single_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    prediction_type: str | None = None,
    ema: bool = True,
) -> Checkpoint:
    """Read an LDM file: a complete model, or a single network with or without its prefix.

    Args:
        path: path of the file, for error messages.
        tensors, metadata: content of the file.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``; None: as in the file, else epsilon.
        ema: use the EMA weights of the denoiser if the file has both.

    Raises:
        CheckpointError: the file is broken, or holds no known network.
    """
    if metadata.get("format") == SINGLE_FILE:
        return _read_own(path, tensors, metadata)
    marked, tensors = without_marks(tensors, path)
    weights, averaged = with_ema(tensors, ema)
    found, unused = networks_in(weights)
    reject_other_files(path, tensors, found)
    marks = read_marks(path, marked, metadata, prediction_type)
    notes = [f"the weights are EMA weights ({EMA}*)"] if averaged else []
    configs = {name: form.infer_config(own, path) for name, (_, form, own) in found.items()}
    family = family_of(full_names(found), configs.get("text_encoder"))
    notes.append(f"{family.name}, since there is " + ", ".join(each.prefix + "*" for each in found.values()))
    parts = {}
    for name, (prefix, form, own) in found.items():
        part = Part.imported(configs[name], own, form, path)
        if name not in (*NETWORKS, CONTROLNET):
            fields = assumed(name, family, len(found) > 1, marks.hidden_state)
            part, surplus = _with_fields(part, form, fields)
            unused += [prefix + key for key in surplus]
        if has_statistics(part):
            part, note = _with_statistics(part, form, marks, family, path)
            notes.append(note)
            if family.overflows_fp16:
                part = part.marked_overflowing(True)
                notes.append(
                    f"an fp16 model runs the first stage in fp32, since that of {family.name} overflows in fp16"
                )
        parts[name] = part
    if "denoiser" in parts:
        parts["denoiser"] = parts["denoiser"].trained_for(marks.diffusion) if marks.stated else parts["denoiser"]
    if CONTROLNET in parts and len(parts) > 1:
        notes.append("the ControlNet is not part of the model; load it with Pipeline.load_controlnet or --controlnet")
    notes += marks.notes
    side = family.sizes[marks.diffusion.parametrization == V()]
    return Checkpoint(
        source=str(path),
        layout="ldm",
        kind=family.name,
        parts=parts,
        tokenizer=tokenizer_of(parts, family),
        conditioner=conditioner_of(parts),
        diffusion=marks.diffusion,
        sampling=marks.sampling(family.sampling),
        size=(side, side),
        provenance={"source": path.name},
        notes=tuple(notes),
        marks=marks.names,
        unused=tuple(unused),
    )


def write_single_file(path: Path, model: LatentDiffusion, dtype: torch.dtype | None = None) -> str:
    """Write a model as an LDM file with its config in the metadata, and return the fingerprint of the file.

    Latents whose statistics are per channel are folded into the first stage, so that a reader that knows only one scaling
    factor generates the same images.

    Raises:
        CheckpointError: the model has parts that such a file has no place for.
    """
    parts = {name: part.to(dtype) for name, part in parts_of(model, "an LDM file").items()}
    forms = {name: _placed(name, part, parts) for name, part in parts.items()}
    scale = SCALE_SDXL if "text_encoder_2" in parts else SCALE
    tensors: dict[str, Tensor] = {}
    for name, (form, prefix) in forms.items():
        if has_statistics(parts[name]):
            stored = statistics_for(model.diffusion, parts[name].state)
            if not stored:
                parts[name], stored = _folded(parts[name], form, scale)
            tensors |= stored
        exported = form.export(parts[name].config, parts[name].weights, prefix)
        tensors |= {prefix + key: tensor for key, tensor in exported.items()}
    tensors |= tensors_for(model.diffusion, next(iter(parts["denoiser"].weights.values())).dtype)
    metadata = _metadata(model, parts)
    metadata["fingerprint"] = fingerprint(
        joined(parts, part_prefixes(model)), fingerprinted_metadata(metadata_of(model.config, model.tokenizer))
    )
    write_tensors(path, tensors, metadata)
    return metadata["fingerprint"]


def write_single_network(path: Path, name: str, part: Part) -> None:
    """Write a network without a prefix, as such files are distributed; a scaling factor that readers do not assume is stored."""
    (form, prefix), stored = _placed(name, part, (name,)), dict[str, Tensor]()
    metadata = {"format": "pt"}
    if has_statistics(part):
        part, stored = _folded(part, form, SCALE)
    if part.diffusion is not None:
        stored |= tensors_for(part.diffusion, next(iter(part.weights.values())).dtype)
        metadata |= metadata_for(part.diffusion)
    write_tensors(path, form.export(part.config, part.weights, prefix) | stored, metadata)


def _read_own(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """Read a file that ldm wrote; nothing is inferred."""
    header = header_of(metadata, path, ModelConfig)
    config: ModelConfig = header.config
    conditioner = build_on_meta(lambda: config.conditioner.build(header.tokenizer), tensors, path)
    described = {name: component.config for name, component in components(config, conditioner).items()}
    marks, tensors = without_marks(tensors, path)
    found, unused = networks_in(tensors, described)
    parts = {}
    for name, own_config in described.items():
        if name not in found:
            raise CheckpointError(f"{path} lacks the {name} that its config describes; download or write it again.")
        prefix, form, own = found[name]
        surplus = [key for key in own if form.is_surplus(own_config, key)]
        unused += [prefix + key for key in surplus]
        kept = {key: tensor for key, tensor in own.items() if key not in surplus}
        parts[name] = Part.imported(own_config, kept, form, path)
    try:
        latents = json.loads(metadata["latents"])
        known = {f"latent_{key}": torch.tensor(latents[key]) for key in ("mean", "std", "preview") if latents[key]}
    except Exception as error:  # the values may have any type
        raise CheckpointError(
            f"the statistics of the latents in {path} cannot be read ({error!r}); download it again."
        ) from None
    parts["first_stage"] = replace(parts["first_stage"], state={**parts["first_stage"].state, **known})
    parts["denoiser"] = parts["denoiser"].trained_for(config.diffusion)
    return Checkpoint(
        source=str(path),
        layout="ldm",
        kind=family_of(full_names(found)).name,
        parts=parts,
        tokenizer=header.tokenizer,
        conditioner=config.conditioner,
        diffusion=config.diffusion,
        sampling=config.sampling,
        size=config.size,
        provenance=header.provenance,
        fingerprint=header.fingerprint,
        fingerprinted={**header.fingerprinted, "format": MODEL},  # the fingerprint is that of the model
        notes=(
            f"written by ldm, all settings are from its metadata; the prediction type is "
            f"{config.diffusion.parametrization.kind}",
        ),
        marks=names_of(marks, metadata),
        unused=tuple(unused),
    )


def _metadata(model: LatentDiffusion, parts: Mapping[str, Part]) -> dict[str, str]:
    """Return the metadata of a file: the native header, and the keys of Stability's model metadata standard."""
    own, written, (height, width) = model.first_stage, parts["first_stage"].state, model.config.size
    preview = written.get("latent_preview")  # a preview fitted on the fly is not saved
    latents = {
        "mean": written["latent_mean"].tolist(),
        "std": written["latent_std"].tolist(),
        "preview": None if preview is None else preview.tolist(),
        "before_folding": {"mean": own.latent_mean.tolist(), "std": own.latent_std.tolist()},
    }
    return metadata_of(model.config, model.tokenizer, SINGLE_FILE) | {
        "latents": json.dumps(latents),
        "provenance": json.dumps(dict(model.provenance)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.resolution": f"{width}x{height}",
        **metadata_for(model.diffusion, _hidden_state(parts)),
    }


def _hidden_state(parts: Mapping[str, Part]) -> str | None:
    """Return the hidden state of a text encoder of SD 1, for which readers assume the last; None for any other."""
    form, prefix = _placed("text_encoder", parts["text_encoder"], parts) if "text_encoder" in parts else (None, "")
    return parts["text_encoder"].config.hidden_state if form and family_of([prefix]) is SD_1 else None


def _with_statistics(part: Part, form: SingleFileFormat, marks: Marks, family: Family, path: Path) -> tuple[Part, str]:
    """Set the statistics of a first stage's latents, and return a note on them."""
    scale, shift = (marks.scale, 0.0) if marks.scale else form.latents(part.config) or (family.scale, 0.0)
    part = replace(with_scale(part, scale, shift), inferred=marks.scale is None)
    if marks.mean is not None and marks.std is not None:
        if len(marks.mean) != part.config.latent_channels:
            raise CheckpointError(
                f"{path}: edm_mean and edm_std are of {len(marks.mean)} channels, but the latents have "
                f"{part.config.latent_channels}; download the file again."
            )
        part = replace(part, state={**part.state, "latent_mean": marks.mean, "latent_std": marks.std / scale})
    origin = "the file says" if marks.scale else f"of {'SD 3' if form.latents(part.config) else family.name}"
    return part, f"the scale of the latents is {scale:g}{f', their shift {shift:g}' if shift else ''}, as {origin}"


def _with_fields(part: Part, form: SingleFileFormat, fields: Values) -> tuple[Part, list[str]]:
    """Set those fields that a part's config has, and return the foreign names of the weights that it then lacks."""
    changed = part.with_config(**{name: value for name, value in fields.items() if hasattr(part.config, name)})
    table = form.key_table(part.config, part.weights, {})
    return changed, [table[name].name for name in part.weights if name not in changed.state]


def _placed(name: str, part: Part, names: Collection[str]) -> tuple[SingleFileFormat, str]:
    """Return the description by which a part of a model is written, and its prefix.

    Raises:
        CheckpointError: LDM files have no place for it.
    """
    for form in part.kind.single_file:
        prefix = form.prefix(part.config, name, names)
        if prefix is not None:
            return form, prefix
    raise no_place("an LDM file", name, part)


def _folded(part: Part, form: SingleFileFormat, scale: float) -> tuple[Part, dict[str, Tensor]]:
    """Fold the statistics of the latents, and return the tensor that stores the scaling factor if readers assume another."""
    assumed = form.latents(part.config) or (scale, 0.0)
    if scale_and_shift_of(part) == assumed:
        return part, {}
    part = folded(part, scale)
    normalization = scale_and_shift_of(part)
    assert normalization is not None, "folded statistics are one factor"
    return part, {} if normalization == assumed else {SCALE_FACTOR: torch.tensor(normalization[0])}
