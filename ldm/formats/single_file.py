"""The single file of latent diffusion: all networks under prefixes, as SD 1.x, SD 2.x and SDXL are distributed.

A file that ldm wrote has the complete config in its metadata. For any other, networks are recognized by names and shapes; what
these do not determine is taken, in this order, from an argument, from the metadata that some tools write, and from the
family of models:

|                 | SD 1                        | SD 2                | SDXL                            |
|-----------------|-----------------------------|---------------------|---------------------------------|
| recognized by   | transformers' text encoder  | open_clip's         | both                            |
| context         | last state, normed          | penultimate, normed | penultimate of both, not normed |
| latent scale    | 0.18215                     | 0.18215             | 0.13025                         |
| prediction type | eps                         | eps (or v)          | eps (or v)                      |
| sampled by      | ddim, 50 steps, scale 7.5   | the same            | euler, 50 steps, scale 5        |
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.clip.tokenizer import CLIP_VOCAB_SIZE, CLIPBPEConfig, Tokenizer
from ldm.diffusion import Diffusion
from ldm.diffusion.parametrization import Eps, Parametrization, V
from ldm.errors import CheckpointError, unknown
from ldm.formats.checkpoint import (
    NETWORKS,
    Checkpoint,
    Part,
    conditioner_of,
    joined,
    no_place,
    part_prefixes,
    parts_of,
)
from ldm.formats.folding import SCALE, SCALE_SDXL, folded, has_statistics, scale_and_shift_of, scale_from, with_scale
from ldm.formats.kinds import KINDS, kind_of
from ldm.formats.native import MODEL, build_on_meta, fingerprinted_metadata, header_of, metadata_of
from ldm.formats.network_folder import canonical
from ldm.formats.tensors import fingerprint, write_tensors
from ldm.model import LatentDiffusion, ModelConfig, SamplingConfig, components
from ldm.nn.network_format import SingleFileFormat, Values

SINGLE_FILE = "ldm.single_file.1"
"""``format`` in the metadata of the files that ldm writes."""

EMA_OF, EMA = "model.", "model_ema."
"""Prefixes of the networks that may have EMA weights, and of the EMA weights, whose names omit the dots."""

SCALE_FACTOR = "scale_factor"
"""Name of the tensor with the scaling factor of the latents, if a file has it."""

REFINER = "conditioner.embedders.0.model."
"""Prefix of the only text encoder of the SDXL refiner."""

TRAINING = ("model.denoiser.", "first_stage.", "clip.")
"""Prefixes in training checkpoints of ldm."""

LORA = r"[._]lora[._]"
"""Pattern of names in LoRA files."""

PREDICTION_TYPES: Mapping[str, type[Parametrization]] = {"epsilon": Eps, "eps": Eps, "v_prediction": V, "v": V}
BY_DEFAULT = "by default; if images are brown and blurred, pass prediction_type='v_prediction'"
SAMPLED = SamplingConfig("ddim", 50, 7.5, "leading", 1, "sigma_min")
SAMPLED_SDXL = SamplingConfig("euler", 50, 5.0, "leading", 1)


@dataclass(frozen=True)
class Family:
    """Settings of a family of published models that its files do not hold.

    Attributes:
        name: name of the family.
        hidden_state, context_norm: fields of the config of its text encoders.
        scale: scaling factor of the latents.
        sampling: defaults of sampling.
        sizes: height and width of the images, of the models that predict eps and v.
    """

    name: str
    hidden_state: str = "penultimate"
    context_norm: bool = True
    scale: float = SCALE
    sampling: SamplingConfig = field(default=SAMPLED)
    sizes: tuple[int, int] = (512, 512)


SD_1 = Family("SD 1", hidden_state="last")
SD_2 = Family("SD 2", sizes=(512, 768))
SDXL = Family("SDXL", context_norm=False, scale=SCALE_SDXL, sampling=SAMPLED_SDXL, sizes=(1024, 1024))
SINGLE = Family("a single network")
FAMILIES = {
    "conditioner.embedders.1.model.": SDXL,
    "cond_stage_model.model.": SD_2,
    "cond_stage_model.transformer.": SD_1,
    "conditioner.embedders.0.transformer.": SINGLE,
    "model.diffusion_model.label_emb.0.0.weight": SDXL,
}
"""Prefixes of names by which a family is recognized; the first that occurs decides."""


class Found(NamedTuple):
    """Tensors under a prefix (removed from their names), and the format description of their network."""

    prefix: str
    form: SingleFileFormat
    tensors: dict[str, Tensor]


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
    found, unused = _sorted(tensors)
    _reject_other_files(path, tensors, found)
    notes = []
    if ema and _average(found, tensors):
        notes.append("the weights of the denoiser are the EMA weights (model_ema)")
    family = _family(found)
    notes.append(f"{family.name}, since there is " + ", ".join(each.prefix + "*" for each in found.values()))
    parametrization, reason = _prediction(prediction_type, tensors, metadata)
    diffusion = Diffusion(parametrization=parametrization)
    stored = _stored_scale(tensors, path)
    parts = {}
    for name, (prefix, form, own) in found.items():
        config = form.infer_config(own, path)
        part = Part.imported(config, own, form, path)
        if name not in NETWORKS:
            part, surplus = _with_fields(part, form, _assumed(name, family, complete=len(found) > 1))
            unused += [prefix + key for key in surplus]
        if has_statistics(part):
            scale, shift = (stored, 0.0) if stored else form.latents(config) or (family.scale, 0.0)
            part = replace(with_scale(part, scale, shift), inferred=stored is None)
            origin = (
                "the file says"
                if stored is not None
                else f"of {family.name if form.latents(config) is None else 'SD 3'}"
            )
            notes.append(
                f"the scale of the latents is {scale:g}{f', their shift {shift:g}' if shift else ''}, as {origin}"
            )
        parts[name] = part
    if "denoiser" in parts:
        parts["denoiser"] = parts["denoiser"].trained_for(diffusion) if reason else parts["denoiser"]
        notes.append(f"the prediction type is {parametrization.kind}, {reason or BY_DEFAULT}")
    side = family.sizes[parametrization == V()]
    return Checkpoint(
        source=str(path),
        layout="ldm",
        kind=family.name,
        parts=parts,
        tokenizer=_tokenizer(parts, family),
        conditioner=conditioner_of(parts),
        diffusion=diffusion,
        sampling=family.sampling,
        size=(side, side),
        provenance={"source": path.name},
        notes=tuple(notes),
        unused=tuple(unused),
    )


def _reject_other_files(path: Path, tensors: Mapping[str, Tensor], found: Mapping[str, Found]) -> None:
    """Raise a CheckpointError for files that are easily mistaken for a model; the message says what they are."""
    if any(name.startswith(REFINER) for name in tensors):
        raise CheckpointError(f"{path} is the refiner of SDXL, which ldm does not read; name the base model.")
    if any(re.search(LORA, name) for name in tensors):
        raise CheckpointError(
            f"{path} is a LoRA, not a model; name a model and load the LoRA into it with Pipeline.load_lora or --lora."
        )
    if path.suffix == ".ckpt" and any(name.startswith(TRAINING) for name in tensors):
        raise CheckpointError(
            f"{path} is a training checkpoint for resuming; name its run folder, which holds a model after its last stage."
        )
    if not found:
        raise CheckpointError(
            f"{path} holds no network that ldm knows (its first name is {next(iter(tensors), 'none')!r}); "
            "name an SD 1.x, SD 2.x or SDXL checkpoint, or a file that ldm wrote."
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
            parts[name], stored = _folded(parts[name], form, scale)
            tensors |= stored
        exported = form.export(parts[name].config, parts[name].weights, prefix)
        tensors |= {prefix + key: tensor for key, tensor in exported.items()}
    metadata = _metadata(model, parts["first_stage"])
    metadata["fingerprint"] = fingerprint(
        joined(parts, part_prefixes(model)), fingerprinted_metadata(metadata_of(model.config, model.tokenizer))
    )
    write_tensors(path, tensors, metadata)
    return metadata["fingerprint"]


def write_single_network(path: Path, name: str, part: Part) -> None:
    """Write a network without a prefix, as such files are distributed; a scaling factor that readers do not assume is stored."""
    (form, prefix), stored = _placed(name, part, (name,)), dict[str, Tensor]()
    if has_statistics(part):
        part, stored = _folded(part, form, SCALE)
    write_tensors(path, form.export(part.config, part.weights, prefix) | stored, {"format": "pt"})


def _read_own(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """Read a file that ldm wrote; nothing is inferred."""
    header = header_of(metadata, path, ModelConfig)
    config: ModelConfig = header.config
    conditioner = build_on_meta(lambda: config.conditioner.build(header.tokenizer), tensors, path)
    described = {name: component.config for name, component in components(config, conditioner).items()}
    found, unused = _sorted(tensors, described)
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
        kind=_family(found).name,
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
        unused=tuple(unused),
    )


def _metadata(model: LatentDiffusion, first_stage: Part) -> dict[str, str]:
    """Return the metadata of a file: the native header, and the keys of Stability's model metadata standard."""
    own, (height, width) = model.first_stage, model.config.size
    preview = first_stage.state.get("latent_preview")  # a preview fitted on the fly is not saved
    latents = {
        "mean": first_stage.state["latent_mean"].tolist(),
        "std": first_stage.state["latent_std"].tolist(),
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


def _forms() -> dict[str, list[SingleFileFormat]]:
    """Return the descriptions of all registered kinds in LDM files, by prefix."""
    forms: dict[str, list[SingleFileFormat]] = {}
    for kind in KINDS.values():
        for form in kind.single_file:
            for prefix in form.prefixes:
                forms.setdefault(prefix, []).append(form)
    return forms


def _sorted(
    tensors: Mapping[str, Tensor], described: Mapping[str, Any] | None = None
) -> tuple[dict[str, Found], list[str]]:
    """Sort tensors by component; also return the names of those that no network needs.

    ``described`` are the configs of the components, if known.
    """
    forms, described = _forms(), described or {}
    has_prefix = any(name.startswith(tuple(forms)) for name in tensors)
    added = "" if has_prefix else _missing_prefix(tensors, forms)
    by_prefix: dict[str, dict[str, Tensor]] = {}
    unused = []
    for name, tensor in tensors.items():
        if name == SCALE_FACTOR:
            continue
        prefix = next((prefix for prefix in forms if (added + name).startswith(prefix)), None)
        if prefix is not None:
            by_prefix.setdefault(prefix, {})[(added + name).removeprefix(prefix)] = tensor
        else:
            unused.append(name)
    found = {}
    for prefix, own in by_prefix.items():
        marked = [form for form in forms[prefix] if any(key.startswith(form.marks) for key in own)]
        form = next(iter([*marked, *forms[prefix]]))
        component = form.prefixes[prefix]
        if component in described:
            form = next((each for each in kind_of(described[component]).single_file if prefix in each.prefixes), form)
        used, ignored = canonical(own, form)
        unused += [(prefix + key).removeprefix(added) for key in ignored]
        if used:
            found[component] = Found(prefix, form, used)
    return found, unused


def _missing_prefix(tensors: Mapping[str, Tensor], forms: Mapping[str, list[SingleFileFormat]]) -> str:
    """Return the prefix that the names of a single network lack; empty if it is not recognized."""
    marks = {mark: prefix for prefix, each in reversed([*forms.items()]) for form in each for mark in form.marks}
    marks |= {prefix.removeprefix(EMA_OF): EMA_OF for prefix in forms if prefix.startswith(EMA_OF)}
    return next((marks[mark] for mark in marks for name in tensors if name.startswith(mark)), "")


def _average(found: dict[str, Found], tensors: Mapping[str, Tensor]) -> bool:
    """Replace weights by their EMA weights if a file has them, and return whether it has any."""
    replaced = False
    for prefix, _, own in found.values():
        if prefix.startswith(EMA_OF):
            start = EMA + prefix.removeprefix(EMA_OF).replace(".", "")
            averaged = {name: start + name.replace(".", "") for name in own}
            averages = {name: tensors[key] for name, key in averaged.items() if key in tensors}
            own.update(averages)
            replaced |= bool(averages)
    return replaced


def _family(found: Mapping[str, Found]) -> Family:
    names = [prefix + name for prefix, _, tensors in found.values() for name in tensors]
    return next((FAMILIES[mark] for mark in FAMILIES for name in names if name.startswith(mark)), SINGLE)


def _assumed(name: str, family: Family, complete: bool) -> dict[str, Any]:
    """Return the fields of the config of a text encoder or first stage that its weights do not determine."""
    fields: dict[str, Any] = {"hidden_state": family.hidden_state, "context_norm": family.context_norm}
    fields["overflows_fp16"] = family is SDXL
    # The pooled state of a model's first text encoder is not used.
    return fields | ({"embed_dim": None} if complete and name == "text_encoder" else {})


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


def _stored_scale(tensors: Mapping[str, Tensor], path: Path) -> float | None:
    """Return the scaling factor of the latents that a file stores, or None.

    Raises:
        CheckpointError: it is not one finite number above 0.
    """
    stored = tensors.get(SCALE_FACTOR)
    if stored is None:
        return None
    try:
        return scale_from(stored)
    except ValueError:
        values = stored.flatten()[:3].tolist()
        raise CheckpointError(
            f"{path}: {SCALE_FACTOR} is {values}, not one number above 0; download the file again."
        ) from None


def _prediction(
    requested: str | None, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Parametrization, str | None]:
    """Return the parametrization, which weights do not determine, and how it is known (None: unknown, assumed epsilon)."""
    stored = metadata.get("modelspec.prediction_type", "").lower()
    if requested is not None:
        if requested not in PREDICTION_TYPES:
            raise CheckpointError(unknown("prediction_type", requested, PREDICTION_TYPES))
        return PREDICTION_TYPES[requested](), "as requested"
    if stored in PREDICTION_TYPES:
        return PREDICTION_TYPES[stored](), "by the metadata modelspec.prediction_type"
    if "v_pred" in tensors:
        return V(), "by the tensor v_pred"
    return Eps(), None


def _tokenizer(parts: Mapping[str, Part], family: Family) -> Tokenizer | None:
    if "text_encoder" not in parts or parts["text_encoder"].config.vocab_size != CLIP_VOCAB_SIZE:
        return None
    length = parts["text_encoder"].config.context_length
    return CLIPBPEConfig(length, pad_id=0 if family is SD_2 else None).build()
