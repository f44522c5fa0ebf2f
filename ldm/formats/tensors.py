"""Files of tensors: read without running anything that stands in them and without copying them, written whole or not at all.

Tensors of a file are views of its pages, which the system brings in as values are read. Whoever passes over all values
once (a copy in another dtype, a check, a fingerprint) gives the pages back, so that a file read in another dtype costs
little more memory than the result.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import CheckpointError, first_line

SAFETENSORS, PICKLES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
"""Endings of the names of files of tensors."""

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
"""A class that the checkpoints of latent-diffusion's time name, as the key of what Lightning noted of it."""

T = TypeVar("T")

CONFIG = "config.json"
"""Of one network, in a folder of diffusers or transformers."""

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", ("model", "pytorch_model")
STEMS = (DIFFUSERS, *TRANSFORMERS)
"""Names of the weights in such a folder, without ending."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, force it to disk, and rename it; readers see all or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written atomically; tensors are stored contiguous, and each of those that share memory by itself."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        stored[name] = whole.clone() if whole.untyped_storage().data_ptr() in storages else whole
        storages.add(stored[name].untyped_storage().data_ptr())
    write_atomically(path, lambda temporary: save_file(stored, temporary, dict(metadata)))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; of a pickle none.

    Raises:
        CheckpointError: the file is missing or is none of tensors.
    """
    if _ending(path) in PICKLES:
        return {}
    return _safetensors(path, lambda file: file.metadata() or {})


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, as of :func:`read_file`."""
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file as views of its pages, and its metadata; a pickle has none.

    The tensors are on the CPU, in the stored dtype; of the values nothing is read yet.

    Args:
        path: a .safetensors file, or a pickle (.ckpt, .pt, .pth, .bin) of a state dict, bare or as the value of
            ``state_dict``; what else stands beside the tensors of a pickle is left out.

    Raises:
        CheckpointError: the file is missing, broken or none of tensors, or is a pickle that would run code.
    """
    tensors, metadata = (_pickled(path), {}) if _ending(path) in PICKLES else _safetensors(path, _all)
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > 500:
            raise CheckpointError(f"{path} holds a tensor of the name {name[:100]!r}, which no model has; get it anew.")
        if tensor.dtype == torch.float4_e2m1fn_x2:
            raise CheckpointError(f"{path}: torch cannot compute with the dtype F4 of {name}; get one of F16 or BF16.")
    return tensors, metadata


def read_weights(folder: str | Path, stem: str | tuple[str, ...] = DIFFUSERS) -> tuple[dict[str, Tensor], list[Path]]:
    """The weights in a folder of diffusers or transformers, as :func:`read_tensors`, and the files that hold them.

    A .safetensors file goes before a pickle, the whole before a variant in fp16; each may be one file or an index with
    the files that it names.

    Args:
        folder: of one part of a model.
        stem: how its files are called, without ending (:data:`STEMS`); of several the first that is there.

    Raises:
        CheckpointError: there are no weights, or the index and its files do not fit each other.
    """
    folder = Path(folder)
    stems = (stem,) if isinstance(stem, str) else stem
    for ending in (SAFETENSORS[1:], "bin"):
        for variant in ("", "fp16."):
            for name in stems:
                whole, index = folder / f"{name}.{variant}{ending}", folder / f"{name}.{ending}.index.{variant}json"
                if whole.is_file():
                    return read_tensors(whole), [whole]
                if index.is_file():
                    return _sharded(index)
    raise CheckpointError(f"{folder} holds no weights, such as {stems[0]}{SAFETENSORS}; get the folder anew.")


def read_json(path: str | Path) -> dict[str, Any]:
    """The section (mapping) in a JSON file.

    Raises:
        CheckpointError: the file is missing, is no JSON, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON and its text alike
        raise CheckpointError(f"{path} cannot be read as JSON ({first_line(error)}); get it anew.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no section of JSON, but {type(content).__name__}; get it anew.")
    return content


def to_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of floating point in ``dtype`` (None: as it is), any other unchanged; pages read for a copy are given back."""
    if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    _give_back(tensor)
    return converted


def channels_last(tensor: Tensor) -> Tensor:
    """A tensor of four dimensions in the layout that convolutions are fastest in; pages read for a copy are given back."""
    if tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    converted = tensor.contiguous(memory_format=torch.channels_last)
    _give_back(tensor)
    return converted


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that are no numbers.

    Raises:
        CheckpointError: naming the first that holds NaN or infinite values.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float() if tensor.itemsize == 1 else tensor  # torch neither sums nor tests fp8
        # A sum is the fastest look at all values; it may also overflow.
        if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
            raise CheckpointError(f"{source}: the weight {name} holds NaN or infinite values; get the file anew.")
        _give_back(tensor)


def fingerprint(tensors: Mapping[str, Tensor], meaning: Mapping[str, Any]) -> str:
    """16 hex digits that change with any weight (names, shapes, values as fp32) and with what they mean (JSON values)."""
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
        _give_back(tensors[name])
    return digest.hexdigest()[:16]


def _ending(path: str | Path) -> str:
    """The ending of the name of a file of tensors that is there, and is not plainly something else."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the file of weights in it.")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    if path.suffix not in (SAFETENSORS, *PICKLES):
        raise CheckpointError(f"{path} is no file of weights; those end in {', '.join((SAFETENSORS, *PICKLES))}.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}); make it readable.") from None
    if not start:
        raise CheckpointError(f"{path} is empty; get it anew.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of git-lfs, not the file itself; fetch it with git lfs pull.")
    if start.lstrip().startswith((b"<!", b"<html", b"<HTML", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not a file of weights; download the file that the page is about.")
    return path.suffix


def _safetensors(path: str | Path, read: Callable[[Any], T]) -> T:
    try:
        with safe_open(str(path), "pt") as file:
            with Path(path).open("rb") as header:  # known to be JSON of a bounded length now
                json.loads(header.read(int.from_bytes(header.read(8), "little")), object_pairs_hook=_once)
            return read(file)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({first_line(error)}); get or make it anew."
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for name, value in pairs:
        if name in section:
            raise ValueError(f"{name[:100]!r} stands twice in its header")
        section[name] = value
    return section


def _all(file: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    return tensors, file.metadata() or {}


class _Callback:
    """Stands for :data:`CALLBACK`, and does nothing."""


def _pickled(path: str | Path) -> dict[str, Tensor]:
    with Path(path).open("rb") as file:
        zipped = file.read(2) == b"PK"  # else of a torch before 1.6, which cannot be mapped
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Callback, CALLBACK)]):
            warnings.simplefilter("ignore")  # of protocols and of storages
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a broken pickle ends in whatever its opcodes came upon
        asked = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if asked:
            raise CheckpointError(
                f"{path} is a pickle that would run code to be read ({asked[1]}); "
                "convert it to .safetensors in a place where that can do no harm."
            ) from None
        # What torch says of a pickle advises to read it with code.
        told = "its pickle is broken" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise CheckpointError(
            f"{path} is not a whole file of torch.save ({type(error).__name__}: {told}); get it anew."
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no weights by name, but {type(content).__name__}; save a state_dict.")
    tensors = {}
    for name, value in content.items():
        told = repr(str(name)[:100])
        if isinstance(value, Mapping):
            raise CheckpointError(f"{path} holds sections ({told}) where weights should stand; save a state_dict.")
        if not isinstance(value, Tensor):
            continue
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.device.type == "cpu"
        if not (isinstance(name, str) and plain and value.nbytes <= value.untyped_storage().nbytes()):
            raise CheckpointError(f"{path}: {told} is no plain tensor; save a state_dict of plain ones.")
        tensors[name] = value.detach()
    return tensors


def _sharded(index: Path) -> tuple[dict[str, Tensor], list[Path]]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{index} has no weight_map from weights to files; get it anew.")
    tensors: dict[str, Tensor] = {}
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.isprintable():
            raise CheckpointError(f"{index} names {shard!r}, which is not a file beside it; get the folder anew.")
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{path}, which {index.name} names, is missing; get the folder anew.")
        held = read_tensors(path)
        for name in held:
            if name in tensors:
                raise CheckpointError(f"{path}: the weight {name} stands in another file of {index.name} too.")
        for name in (name for name, place in places.items() if place == shard and name not in held):
            raise CheckpointError(f"{path}: the weight {name!r} is missing, which {index.name} places there.")
        tensors |= held
    return tensors, [index.parent / shard for shard in shards]


def _give_back(tensor: Tensor) -> None:
    """Let the system take the pages of a mapped file that lie within ``tensor``; who reads it again finds the same.

    Memory that is no mapped file, or was written to since, is left alone: its pages are known as such in Linux's pagemap.
    """
    page, start = mmap.PAGESIZE, tensor.data_ptr()
    first, last = -(-start // page), (start + tensor.nbytes) // page
    if sys.platform != "linux" or first >= last or not tensor.is_contiguous():
        return
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(8 * first)
            pages = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    except OSError:
        return
    present, of_file = pages >> np.uint64(62) > 0, pages >> np.uint64(61) & np.uint64(1) > 0
    if len(pages) == last - first and bool((of_file | ~present).all()):
        size = ctypes.c_size_t((last - first) * page)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), size, mmap.MADV_DONTNEED)
