"""The folder of one network: a JSON config and a file of weights, as diffusers, transformers and open_clip write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.clip.tokenizer import Tokenizer
from ldm.errors import CheckpointError, first_line
from ldm.formats.checkpoint import Checkpoint, Part, conditioner_of, of_clip
from ldm.formats.folding import SCALE, folded, has_statistics, scale_and_shift_of, scale_from, with_scale
from ldm.formats.kinds import KINDS
from ldm.formats.tensors import CONFIG, read_json, read_weights, write_json, write_tensors
from ldm.formats.tokenizer import has_tokenizer, read_tokenizer
from ldm.nn.network_format import FolderFormat, NetworkFormat, Values, is_weight, outer_prefix

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files of the image processor; the first is written."""

CLASS_KEYS = ("_class_name", "model_type")
"""Keys of ``config.json`` that name the class of the network, in diffusers and in transformers."""


def folder_formats() -> list[FolderFormat]:
    """Return the descriptions of all registered kinds in folders."""
    return [form for kind in KINDS.values() for form in kind.folders]


def format_of(folder: Path) -> FolderFormat | None:
    """Return the description that fits a folder of one network; None if there is none."""
    values = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    named = [values[key] for key in CLASS_KEYS if key in values]
    fitting = [form for form in folder_formats() if any(name in form.classes for name in named)]
    others = [form for form in folder_formats() if form.config_file != CONFIG and (folder / form.config_file).is_file()]
    return next(iter([*fitting, *others]), None)


def read_network(folder: Path, form: FolderFormat, variant: str | None = None) -> tuple[Part, Values]:
    """Read a network and its JSON config; ``variant`` as in :func:`ldm.formats.tensors.read_weights`.

    Raises:
        CheckpointError: it is broken, or not supported by ldm.
    """
    where = folder / form.config_file
    values = read_json(where)
    processor = next((folder / name for name in PREPROCESSORS if (folder / name).is_file()), None)
    if processor is not None:
        values["preprocessor"] = read_json(processor)
    tensors, files = read_weights(folder, form.weights, variant)
    naming = _naming(tensors, form)
    tensors, _ = canonical(tensors, naming)
    part = Part.imported(form.read_config(values, tensors, where), tensors, naming, files[0], values)
    return (_with_statistics(part, values, where) if has_statistics(part) else part), values


def _naming(tensors: Mapping[str, Tensor], form: FolderFormat) -> NetworkFormat:
    """Return the description of the names in a folder: ``form``, unless they are those of LDM files."""
    of_files = (each for kind in KINDS.values() if form in kind.folders for each in kind.single_file)
    return next((each for each in (form, *of_files) if each.fits(tensors)), form)


def canonical(tensors: Mapping[str, Tensor], form: NetworkFormat) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by the names of the format's key table, and the names of those that it does not use.

    Raises:
        CheckpointError: two tensors have the same name there.
    """
    outer = outer_prefix(tensors, form.marks)
    used: dict[str, Tensor] = {}
    unused = []
    for name, tensor in tensors.items():
        theirs = form.canonical_name(name.removeprefix(outer)) if is_weight(name) else None
        if theirs is None:
            unused.append(name)
        elif theirs in used:
            raise CheckpointError(f"the weights of {theirs} occur twice, once as {name}; remove one of them.")
        else:
            used[theirs] = tensor
    return used, unused


@dataclass(frozen=True)
class NetworkFiles:
    """The files of one network: JSON values by file name, tensors, and the name of their file."""

    values: Mapping[str, Values]
    tensors: Mapping[str, Tensor]
    weights: str

    def write(self, folder: Path, checked: bool = False) -> None:
        """Write the files to a folder for this network only; the config, which makes it one, is the last.

        ``checked`` and errors are those of :func:`ldm.formats.tensors.write_tensors`.
        """
        write_tensors(folder / self.weights, self.tensors, {"format": "pt"}, checked)
        for name, values in self.values.items():
            write_json(folder / name, values, sort_keys=True)


def network_files(form: FolderFormat, part: Part, size: tuple[int, int], extra: Values | None = None) -> NetworkFiles:
    """Return a part as the files of a folder that the foreign library opens.

    Args:
        form: description of the network.
        part: the network; a first stage is folded if necessary.
        size: height and width of the images or, as the form says, of the latents.
        extra: JSON values that follow from other parts of the model.

    Raises:
        CheckpointError: the foreign library has no such network.
    """
    extra = dict(extra or {})
    if has_statistics(part):
        part = folded(part, shifts=True)
        scale, shift = scale_and_shift_of(part) or (1.0, 0.0)
        extra |= {"scaling_factor": scale} | ({"shift_factor": shift} if shift else {})
    config = form.write_config(part.config, size, extra)
    processor = form.write_preprocessor(part.config)
    values = ({} if processor is None else {PREPROCESSORS[0]: processor}) | {form.config_file: config}
    return NetworkFiles(values, form.export(part.config, part.weights, config), f"{form.weights[0]}.safetensors")


def read_network_folder(path: Path, variant: str | None = None) -> Checkpoint:
    """Read a folder of one network, or of a CLIP; ``variant`` as in :func:`ldm.formats.tensors.read_weights`.

    Raises:
        CheckpointError: it is broken, or of a kind that ldm does not read.
    """
    form = format_of(path)
    if form is None:
        values = read_json(path / CONFIG)
        found = next((values[key] for key in CLASS_KEYS if key in values), "no class")
        known = [name for each in folder_formats() for name in each.classes]
        raise CheckpointError(
            f"{path / CONFIG} is for {found}; ldm reads folders of {', '.join(known)}, of open_clip, and of pipelines."
        )
    part, content = read_network(path, form, variant)
    parts = {form.component: part} if form.component else of_clip(part.config, part.state)
    note = f"by {form.config_file}: {next((content[key] for key in CLASS_KEYS if key in content), form.library)}"
    kind = part.kind.name if not form.component else f"a single {part.kind.name}"
    return Checkpoint(
        str(path), form.library, kind, parts, _tokenizer(path, form), conditioner_of(parts), notes=(note,)
    )


def _tokenizer(path: Path, form: FolderFormat) -> Tokenizer | None:
    """Return the tokenizer in the folder of a text encoder or in its pipeline; None if there is none."""
    folders = (path, path.parent / "tokenizer") if form.reads_text else ()
    found = next((each for each in folders if has_tokenizer(each)), None)
    return read_tokenizer(found) if found else None


def _with_statistics(part: Part, values: Values, where: Path) -> Part:
    """Set the statistics of the latents: z = normalized * std / scaling_factor + mean."""
    try:
        part = with_scale(part, scale_from(values.get("scaling_factor", SCALE)))
        state = dict(part.state)
        if values.get("latents_std") is not None:
            state["latent_std"] = state["latent_std"] * torch.tensor(values["latents_std"], dtype=torch.float32)
        mean = values.get("latents_mean") or [values.get("shift_factor") or 0.0] * part.config.latent_channels
        state["latent_mean"] = torch.tensor(mean, dtype=torch.float32)
    except Exception as error:  # the values may have any type
        raise CheckpointError(f"{where} does not say how latents are normalised: {first_line(error)}.") from None
    return replace(part, state=state)
