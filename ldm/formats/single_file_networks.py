"""The networks in an LDM file, found by the prefixes and names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats.folding import SCALE_FACTOR
from ldm.formats.kinds import KINDS, kind_of
from ldm.formats.network_folder import canonical
from ldm.nn.network_format import SingleFileFormat

EMA_OF, EMA = "model.", "model_ema."
"""Prefixes of the networks that may have EMA weights, and of the EMA weights, whose names omit the dots."""

REFINER = "conditioner.embedders.0.model."
"""Prefix of the only text encoder of the SDXL refiner."""

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


def full_names(found: Mapping[str, Found]) -> list[str]:
    """Return the names of all tensors of the networks, with their prefixes."""
    return [prefix + name for prefix, _, tensors in found.values() for name in tensors]


def use_ema(found: dict[str, Found], tensors: Mapping[str, Tensor]) -> bool:
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
