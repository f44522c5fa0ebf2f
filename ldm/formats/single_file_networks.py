"""The networks in an LDM file, found by the prefixes and names of its tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats.kinds import KINDS, kind_of
from ldm.formats.network_folder import canonical
from ldm.nn.network_format import SingleFileFormat, is_weight, outer_prefix

EMA_OF, EMA = "model.", "model_ema."
"""Prefix of the networks that a model averages, which the names of EMA weights omit, and prefix of these names."""

EMA_NAME = re.compile(r"((?:.+\.)?)(?:model_ema|ema_model|ema)\.(.+)")
"""Name of an EMA weight: where the averaged module is in the file, and the name there, mostly without its dots."""

REFINER = "conditioner.embedders.0.model."
"""Prefix of the only text encoder of the SDXL refiner."""

ALIASES = {
    "diffusion_model.": "model.diffusion_model.",
    "unet.": "model.diffusion_model.",
    "vae.": "first_stage_model.",
    "text_encoder.": "cond_stage_model.transformer.",
    "text_encoders.clip_l.transformer.": "cond_stage_model.transformer.",
    "text_encoder_2.": "conditioner.embedders.1.transformer.",
    "text_encoders.clip_g.transformer.": "conditioner.embedders.1.transformer.",
}
"""Prefixes of networks in files of other programs, by that of LDM files."""

FIRST_OF_TWO = {"cond_stage_model.transformer.": "conditioner.embedders.0.transformer."}
"""Prefixes in LDM files of text encoders that are the first of two, by those that they have alone."""

TRAINING = ("model.denoiser.", "first_stage.", "clip.")
"""Prefixes in training checkpoints of ldm."""

LORA = r"[._]lora[._]"
"""Pattern of names in LoRA files."""


class Found(NamedTuple):
    """Tensors under a prefix (removed from their names), and the format description of their network."""

    prefix: str
    form: SingleFileFormat
    tensors: dict[str, Tensor]


def _forms() -> dict[str, list[SingleFileFormat]]:
    """Return the descriptions of all registered kinds in LDM files, by prefix."""
    forms: dict[str, list[SingleFileFormat]] = {}
    for kind in KINDS.values():
        for form in kind.single_file:
            for prefix in form.prefixes:
                forms.setdefault(prefix, []).append(form)
    return forms


def networks_in(
    tensors: Mapping[str, Tensor], described: Mapping[str, Any] | None = None
) -> tuple[dict[str, Found], list[str]]:
    """Sort tensors by component; also return the names of those that no network needs.

    ``described`` are the configs of the components, if known.
    """
    forms, described = _forms(), described or {}
    unused = [name for name in tensors if not is_weight(name)]
    aliases = {
        alias: tuple(alias + mark for form in forms[prefix] for mark in form.marks) for alias, prefix in ALIASES.items()
    }
    outer = outer_prefix(tensors, (*forms, *itertools.chain(*aliases.values())))
    tensors = {name.removeprefix(outer): tensor for name, tensor in tensors.items() if is_weight(name)}
    present = [alias for alias, marks in aliases.items() if any(name.startswith(marks) for name in tensors)]
    two_encoders = any(ALIASES[alias].startswith("conditioner.embedders.1.") for alias in present)
    for alias in present:
        prefix = ALIASES[alias]
        tensors = _without_alias(tensors, alias, FIRST_OF_TWO.get(prefix, prefix) if two_encoders else prefix)
    has_prefix = any(name.startswith(tuple(forms)) for name in tensors)
    added = "" if has_prefix else _missing_prefix(tensors, forms)
    by_prefix: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in forms if (added + name).startswith(prefix)), None)
        if prefix is not None:
            by_prefix.setdefault(prefix, {})[(added + name).removeprefix(prefix)] = tensor
        else:
            unused.append(name)
    found = {}
    for prefix, own in by_prefix.items():
        marked = [form for form in forms[prefix] if form.fits(own)]
        form = next(iter([*marked, *forms[prefix]]))
        component = form.prefixes[prefix]
        if component in described:
            form = next((each for each in kind_of(described[component]).single_file if prefix in each.prefixes), form)
        used, ignored = canonical(own, form)
        unused += [(prefix + key).removeprefix(added) for key in ignored]
        if used:
            found[component] = Found(prefix, form, used)
    return found, unused


def _without_alias(tensors: Mapping[str, Tensor], alias: str, prefix: str) -> dict[str, Tensor]:
    """Put ``prefix`` in place of its alias, unless the file has a network with the prefix, too."""
    if any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    return {
        prefix + name.removeprefix(alias) if name.startswith(alias) else name: tensor
        for name, tensor in tensors.items()
    }


def _missing_prefix(tensors: Mapping[str, Tensor], forms: Mapping[str, list[SingleFileFormat]]) -> str:
    """Return the prefix that the names of a single network lack; empty if it is not recognized."""
    marks = {mark: prefix for prefix, each in reversed([*forms.items()]) for form in each for mark in form.marks}
    marks |= {prefix.removeprefix(EMA_OF): EMA_OF for prefix in forms if prefix.startswith(EMA_OF)}
    outer = outer_prefix(tensors, tuple(marks))
    for mark, prefix in marks.items():
        for name in tensors:
            short = name.removeprefix(outer)
            if short.startswith(mark if "." in short else mark.replace(".", "")):  # EMA weights have no dots
                return prefix
    return ""


def full_names(found: Mapping[str, Found]) -> list[str]:
    """Return the names of all tensors of the networks, with their prefixes."""
    return [prefix + name for prefix, _, tensors in found.values() for name in tensors]


def with_ema(tensors: Mapping[str, Tensor], ema: bool) -> tuple[dict[str, Tensor], bool]:
    """Return the weights of a file, EMA weights in place of those that they are averages of, and whether there are any.

    Args:
        tensors: tensors of the file.
        ema: use the EMA weights if the file has both; if it has EMA weights alone, these are used.
    """
    plain, averages = dict[str, Tensor](), dict[tuple[str, str], Tensor]()
    for name, tensor in tensors.items():
        found = EMA_NAME.fullmatch(name) if "ema" in name else None
        if found is None or not is_weight(name):
            plain[name] = tensor
        else:
            averages[found[1], found[2].replace(".", "")] = tensor
    places = {place for place, _ in averages}
    names: dict[tuple[str, str], str] = {}
    for name in plain:
        for place in (place for place in places if name.startswith(place)):
            within = name.removeprefix(place)
            names |= {(place, each.replace(".", "")): name for each in (within, within.removeprefix(EMA_OF))}
    both = {names[key]: tensor for key, tensor in averages.items() if key in names}
    if both:
        return (plain | both if ema else plain), ema
    return plain | {place + _with_prefix(name): tensor for (place, name), tensor in averages.items()}, bool(averages)


def _with_prefix(name: str) -> str:
    """Return the name of an EMA weight with the prefix of its network; the other dots are restored by its format."""
    averaged = {
        prefix.removeprefix(EMA_OF).replace(".", ""): prefix for prefix in _forms() if prefix.startswith(EMA_OF)
    }
    return next((full + name.removeprefix(each) for each, full in averaged.items() if name.startswith(each)), name)


def reject_other_files(path: Path, tensors: Mapping[str, Tensor], found: Mapping[str, Found]) -> None:
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
