"""Files of models: one door for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch

from ldm.errors import CheckpointError
from ldm.formats.checkpoint import Checkpoint, read_native
from ldm.formats.clip import is_clip, is_open_clip, read_clip
from ldm.formats.diffusers_folder import INDEX, is_folder, read_folder, write_folder
from ldm.formats.hub import fetch, is_hub_id
from ldm.formats.native import HELD, save_model
from ldm.formats.single_file import SINGLE_FILE, read_single_file, write_single_file
from ldm.formats.tensors import CONFIG, PICKLES, SAFETENSORS, STEMS, read_file, read_metadata
from ldm.model import LatentDiffusion

SHIPPED = "emoji"
"""The name of the model that comes along."""

MODEL_FILE = "model.safetensors"
"""The whole model in a run folder, after its last stage."""

ASSETS = Path(__file__).parents[1] / "assets"

FORMATS = ("native", "ldm", "diffusers")
"""What :func:`save` writes."""

FILES = ("native", "ldm")
"""Formats of one file; others are folders."""

Source = str | PathLike[str]


def load(
    source: Source = SHIPPED,
    *,
    vae: Source | None = None,
    unet: Source | None = None,
    text_encoder: Source | None = None,
    text_encoder_2: Source | None = None,
    revision: str | None = None,
    prediction_type: str | None = None,
    ema: bool = True,
    dtype: torch.dtype | None = torch.float32,
) -> LatentDiffusion:
    """A whole model on the CPU, in evaluation mode, its parameters frozen.

    Args:
        source: ``"emoji"`` for the shipped model (a folder of that name is ``"./emoji"``); a run folder or another with a
            ``model.safetensors`` of ours in it, or such a file; an LDM single file of SD 1.x, 2.x or SDXL
            (``.safetensors`` or ``.ckpt``); a folder of a diffusers pipeline; or the id of either on the hub.
        vae, unet, text_encoder, text_encoder_2: sources of what is to stand in place of a part.
        revision: branch, tag or commit of a hub id.
        prediction_type: ``"epsilon"`` or ``"v_prediction"`` of a foreign U-Net; default: as the source says, else epsilon.
        ema: take averaged weights where an LDM file has both.
        dtype: of the networks; None: as stored. The statistics of the latents stay fp32.

    Raises:
        CheckpointError: there is nothing that can be read, or its parts do not fit each other.
    """
    found = read(
        source,
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        revision=revision,
        prediction_type=prediction_type,
        ema=ema,
    )
    return found.build(dtype)


def read(
    source: Source,
    *,
    vae: Source | None = None,
    unet: Source | None = None,
    text_encoder: Source | None = None,
    text_encoder_2: Source | None = None,
    revision: str | None = None,
    prediction_type: str | None = None,
    ema: bool = True,
) -> Checkpoint:
    """What a source holds, a whole model or a lone network, no value of its weights read yet.

    Arguments and errors as of :func:`load`; a folder or file of one network is a source too, of diffusers or transformers,
    or under its names in an LDM file, and so is a CLIP of transformers or open_clip.
    """
    path = find(source, revision)
    if path.is_dir():
        found = read_clip(path) if is_clip(path) else read_folder(path, prediction_type)
    else:
        found = _read_file(path, prediction_type, ema)
    parts = {"vae": vae, "unet": unet, "text": text_encoder, "text_2": text_encoder_2}
    for name, given in parts.items():
        if given is not None:
            found = found.with_part(name, read(given, prediction_type=prediction_type, ema=ema))
    return found


def _read_file(path: Path, prediction_type: str | None, ema: bool) -> Checkpoint:
    tensors, metadata = read_file(path)
    held = metadata.get("format", "")
    if held in HELD:
        return read_native(path, tensors, metadata)
    if held.startswith("ldm.") and held != SINGLE_FILE:
        raise CheckpointError(
            f"{path}: its metadata says {held!r}, which this version does not know; install a newer ldm."
        )
    if is_open_clip(tensors):
        return read_clip(path)
    return read_single_file(path, tensors, metadata, prediction_type, ema)


def save(model: LatentDiffusion, path: Source, to: str = "native", dtype: torch.dtype | None = None) -> Path:
    """Write a model, and return the file or folder.

    Args:
        model: of whatever source.
        path: a folder, or a file name that ends in .safetensors; of diffusers a folder.
        to: ``"native"``, ``"ldm"`` (single file) or ``"diffusers"`` (folder).
        dtype: of the stored weights; default: as they are.

    Raises:
        CheckpointError: the model has parts that the format has no place for, or the path cannot be written to.
    """
    if to not in FORMATS:
        raise CheckpointError(f"there is no format {to!r}; choose one of {', '.join(FORMATS)}.")
    path = target(path, to)
    with writing(path):
        if to == "diffusers":
            write_folder(path, model, dtype)
        elif to == "native":
            save_model(path, model, model.provenance, dtype)
        else:
            write_single_file(path, model, dtype)
    return path


def target(path: Source, to: str) -> Path:
    """The file, or of a format that is one the folder, that a model or network is written to.

    Raises:
        CheckpointError: it would not be read again from there, or is no folder where one is needed.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} would be a pickle, which ldm does not write; let its name end in {SAFETENSORS}.")
    if to not in FILES:
        if path.suffix == SAFETENSORS or path.is_file():
            raise CheckpointError(f"{path} is no folder, which {to} needs; name one.")
        return path
    if (path / INDEX).is_file():
        raise CheckpointError(f"{path} is a folder of diffusers, which would hide what is written there; name another.")
    return path if path.suffix == SAFETENSORS else path / MODEL_FILE


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses while ``path`` is written is told as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written to ({error.strerror}); name another place.") from None


def find(source: Source, revision: str | None = None) -> Path:
    """The file or folder that :func:`load` reads for ``source``, fetched from the hub if it has to be.

    Raises:
        CheckpointError: saying what is there instead.
    """
    if source == SHIPPED and revision is None:
        return _existing(ASSETS / MODEL_FILE, "this installation lacks the shipped model; install ldm anew.")
    if isinstance(source, str) and is_hub_id(source):
        source = fetch(source, revision)
    elif revision is not None:
        raise CheckpointError(f"{source} is no model on the hub, so it has no revision {revision!r}; leave that out.")
    path = Path(source)
    if path.is_dir():
        if is_folder(path) or is_clip(path):
            return path
        return _existing(
            path / MODEL_FILE,
            f"{path} holds no {INDEX}, which makes folders such as its unet a pipeline of diffusers; get it anew."
            if (path / "unet").is_dir()
            else f"{path} holds no {MODEL_FILE}; a run has one after its last stage (tools/train.py --stage all).",
        )
    _existing(
        path, f"there is no model {path}; name a run folder, a file, a diffusers folder, a hub id, or {SHIPPED!r}."
    )
    if path.suffix not in (SAFETENSORS, *PICKLES):
        raise CheckpointError(f"{path} is no file of weights; those end in {', '.join((SAFETENSORS, *PICKLES))}.")
    of_a_folder = path.name.startswith(STEMS) and (path.parent / CONFIG).is_file() and not _is_native(path)
    return path.parent if of_a_folder else path


def _is_native(path: Path) -> bool:
    return path.is_file() and read_metadata(path).get("format") in HELD


def _existing(path: Path, otherwise: str) -> Path:
    if not path.is_file():
        raise CheckpointError(otherwise)
    return path
