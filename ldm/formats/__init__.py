"""Load, read and save models in any of the supported formats.

Foreign formats are imported where they are used, so that native models load without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.devices import check_dtype, usual_torch_state
from ldm.errors import CheckpointError, some, warn
from ldm.formats.checkpoint import Checkpoint, read_native
from ldm.formats.native import CONFIG_BY_FORMAT, plain_model, save_model
from ldm.formats.sharded_checkpoint import is_sharded
from ldm.formats.tensors import CONFIG, INDEX, PICKLES, SAFETENSORS, STEMS, read_file, read_metadata
from ldm.formats.training_checkpoint import checkpoints_in, find_checkpoint
from ldm.load_options import LoadOptions, Source
from ldm.model import LatentDiffusion
from ldm.paths import expanded

SHIPPED = "emoji"
"""Name of the shipped model."""

MODEL_FILE = "model.safetensors"
"""File of the complete model in a run folder, written after the last stage."""

STAGE_FILE = "final.safetensors"
"""File of the network that a stage has trained, in the folder of the stage."""

ASSETS = Path(__file__).parents[1] / "assets"

FORMATS = ("native", "ldm", "diffusers")
"""Formats that :func:`save` writes."""

FILES = ("native", "ldm")
"""Formats that are a single file; the others are folders."""


def load(
    source: Source = SHIPPED,
    options: LoadOptions | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    **changes: Any,
) -> LatentDiffusion:
    """Load a complete model on the CPU, in evaluation mode, its parameters frozen.

    Args:
        source: ``"emoji"`` for the shipped model (a folder of that name is ``"./emoji"``); a run folder or another with a
            native ``model.safetensors`` in it, or such a file; an LDM single file of SD 1.x, 2.x or SDXL
            (``.safetensors`` or ``.ckpt``); a folder of a diffusers pipeline; or the id of either on the hub.
        options: parts to replace, revision, subfolder, variant, prediction type; default: :class:`LoadOptions`.
        dtype: dtype of the networks; None: as stored. The statistics of the latents stay fp32.
        changes: fields of ``options`` to change: ``vae="vae-ft-mse.safetensors"``.

    Raises:
        CheckpointError: there is nothing that can be read, or the parts do not fit each other.
    """
    options = LoadOptions.of(options, changes)
    with usual_torch_state():
        return read(source, options).build(check_dtype(dtype))


def read(source: Source, options: LoadOptions | None = None, **changes: Any) -> Checkpoint:
    """Read a source, a complete model or a single network; values of weights are read only when they are used.

    Arguments and errors are those of :func:`load`. A source may also be one network (a diffusers or transformers folder,
    or an LDM file with its weights), or a CLIP of transformers or open_clip.
    """
    options = LoadOptions.of(options, changes)
    with usual_torch_state():
        path = find(source, options.revision, options.subfolder, options.variant, options.checkpoint)
        is_folder = path.is_dir() and not is_sharded(path)
        found = _read_folder(path, options) if is_folder else _read_file(path, options)
        of_part = LoadOptions(prediction_type=options.prediction_type, ema=options.ema)
        for name, given in options.replacements().items():
            found = found.with_part(name, read(given, of_part))
        return found


def _read_folder(path: Path, options: LoadOptions) -> Checkpoint:
    from ldm.formats.clip import is_clip, read_clip
    from ldm.formats.diffusers_folder import read_folder

    if is_clip(path):
        return read_clip(path, variant=options.variant)
    return read_folder(path, options.prediction_type, options.variant)


def _read_file(path: Path, options: LoadOptions) -> Checkpoint:
    tensors, metadata = read_file(path, options.ema)
    held = metadata.get("format", "")
    if held in CONFIG_BY_FORMAT:
        return read_native(path, tensors, metadata)

    from ldm.formats.clip import is_open_clip, read_clip
    from ldm.formats.single_file import SINGLE_FILE, read_single_file

    if held.startswith("ldm.") and held != SINGLE_FILE:
        raise CheckpointError(
            f"{path}: its metadata has the format {held!r}, which this version does not know; install a newer ldm."
        )
    if is_open_clip(tensors):
        return read_clip(path)
    return read_single_file(path, tensors, metadata, options.prediction_type, options.ema)


@usual_torch_state()
def save(model: nn.Module, path: Source, to: str = "native", dtype: torch.dtype | None = None) -> Path:
    """Write a model and return the file or folder.

    Args:
        model: a :class:`LatentDiffusion` from any source; it and its parts may be wrapped by ``torch.compile`` and others.
        path: a folder, or a file name that ends in .safetensors; for diffusers a folder.
        to: ``"native"``, ``"ldm"`` (single file) or ``"diffusers"`` (folder).
        dtype: dtype of the stored weights; default: unchanged.

    Raises:
        CheckpointError: the model has parts that the format has no place for or that could not be read again, or the path cannot
            be written to. In all cases but the last nothing is written.
    """
    if to not in FORMATS:
        raise CheckpointError(f"there is no format {to!r}; choose one of {', '.join(FORMATS)}.")
    check_dtype(dtype)
    with writing(Path(expanded(path))):
        path = target(path, to)
    model = plain_model(model, path)
    if to != "native" and model.tiny_decoder is not None:
        warn(f"{path} has no place for the tiny decoder, which is left out; write a native file to keep it.")
        model.tiny_decoder, model.config = None, replace(model.config, tiny_decoder=None)
    with writing(path):
        if to == "diffusers":
            from ldm.formats.diffusers_folder import write_folder

            write_folder(path, model, dtype)
        elif to == "native":
            save_model(path, model, model.provenance, dtype)
        else:
            from ldm.formats.single_file import write_single_file

            if tokens := ", ".join(each.token for each in model.textual_inversions.loaded):
                warn(
                    f"{path} has the tokens {tokens}, which other programs do not read from an LDM file; "
                    "for these, unload the textual inversions before writing it."
                )
            write_single_file(path, model, dtype)
    return path


def target(path: Source, to: str) -> Path:
    """Return the file that a model or network is written to, or the folder of a format that is one.

    Raises:
        CheckpointError: it could not be read again from there, or it is a file where a folder is needed.
    """
    if not expanded(path):  # as of a shell variable that is not set
        raise CheckpointError("the path to write to is empty; name a file or folder.")
    path = Path(expanded(path))
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} would be a pickle, which ldm does not write; let its name end in {SAFETENSORS}.")
    if to not in FILES:
        if path.suffix == SAFETENSORS or path.is_file():
            raise CheckpointError(f"{path} is not a folder, which {to} needs; name a folder.")
        return path
    if (path / INDEX).is_file():
        raise CheckpointError(
            f"{path} is a diffusers folder, which would hide a file written there; name another path."
        )
    return path if path.suffix == SAFETENSORS else path / MODEL_FILE


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError while ``path`` is written to a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written to ({error.strerror}); name another path.") from None


def find(
    source: Source,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    checkpoint: str | None = None,
) -> Path:
    """Return the file or folder that :func:`load` reads for ``source``; it is fetched from the hub if necessary.

    Args:
        source, revision, subfolder, variant: see :func:`load` and :class:`LoadOptions`.
        checkpoint: checkpoint of a training in a run folder, or in the folder of a stage: ``"best"``, ``"last"`` or a step.

    Raises:
        CheckpointError: there is no model; the message says what was found instead.
    """
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise CheckpointError(f"the subfolder {subfolder!r} is not within {source}; name a folder in it.")
    if checkpoint is not None:
        for name, value in {"revision": revision, "variant": variant}.items():
            if value is not None:
                raise CheckpointError(f"the checkpoint {checkpoint!r} of a training has no {name} {value!r}; omit it.")
        folder = Path(expanded(source)) / (subfolder or "")
        if not folder.is_dir():
            raise CheckpointError(f"{source} is not a run folder, so it has no checkpoint {checkpoint!r}; omit it.")
        return find_checkpoint(folder, checkpoint)
    path = _find(source, revision, subfolder, variant)
    if variant is not None and not (path.is_dir() and _has_variant(path, variant)):
        raise CheckpointError(f"{path} has no weights of the variant {variant!r}; omit the variant.")
    return path


def _has_variant(folder: Path, variant: str) -> bool:
    files = [each.name for pattern in ("*", "*/*") for each in folder.glob(pattern)]
    return any(f".{variant}{end}" in name for name in files for end in (".", "-"))


def _find(source: Source, revision: str | None, subfolder: str | None, variant: str | None) -> Path:
    if source == SHIPPED and revision is None and subfolder is None:
        return _existing(ASSETS / MODEL_FILE, "this installation lacks the shipped model; reinstall ldm.")

    from ldm.formats.clip import is_clip
    from ldm.formats.diffusers_folder import is_folder
    from ldm.formats.hub import fetch, is_hub_id

    if isinstance(source, str) and is_hub_id(source):
        source = fetch(source, revision, subfolder, variant)
    elif revision is not None:
        raise CheckpointError(
            f"{source} is not a model on the hub, so it has no revision {revision!r}; omit the revision."
        )
    elif subfolder is not None:
        if not (Path(expanded(source)) / subfolder).is_dir():
            raise CheckpointError(f"{source} has no folder {subfolder!r}; name one that it has, or omit the subfolder.")
        source = Path(expanded(source)) / subfolder
    path = Path(expanded(source))
    if path.is_dir() and not is_sharded(path):
        if is_folder(path) or is_clip(path):
            return path
        for name in (MODEL_FILE, STAGE_FILE):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(_without_model(path))
    _existing(
        path, f"there is no model {path}; name a run folder, a file, a diffusers folder, a hub id, or {SHIPPED!r}."
    )
    if path.suffix not in (SAFETENSORS, *PICKLES):
        raise CheckpointError(f"{path} is not a weight file; their names end in {', '.join((SAFETENSORS, *PICKLES))}.")
    of_a_folder = path.name.startswith(STEMS) and (path.parent / CONFIG).is_file() and not _is_native(path)
    return path.parent if of_a_folder else path


def _without_model(path: Path) -> str:
    """Return the sentence for a folder without a complete model."""
    from ldm.formats.diffusers_folder import folders

    checkpoints = [str(each) for each in checkpoints_in(path)]
    if not checkpoints and any((path / folder).is_dir() for folder in folders()):
        return f"{path} holds no {INDEX}, which a diffusers pipeline needs; download the folder again."
    until_then = f"; until then use a checkpoint of it ({some(checkpoints)})" if checkpoints else ""
    return f"{path} holds no {MODEL_FILE}; a run has one after its last stage (tools/train.py --stage all){until_then}."


def _is_native(path: Path) -> bool:
    return path.is_file() and read_metadata(path).get("format") in CONFIG_BY_FORMAT


def _existing(path: Path, otherwise: str) -> Path:
    if not (path.is_file() or is_sharded(path)):
        raise CheckpointError(otherwise)
    return path
