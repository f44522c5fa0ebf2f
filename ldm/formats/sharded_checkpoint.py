"""Checkpoints that all ranks of a training write together: a folder, by torch.distributed.checkpoint.

The folder holds the tensors as torch.distributed.checkpoint stores them, a file for each rank, and ``structure.pt``: the
checkpoint with the name of a tensor in place of each. Any number of ranks can read it, or one process without a process group.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STRUCTURE = "structure.pt"
"""File of all that is not a tensor; it is written last."""

MARK = "tensor:"
"""Prefix of the name of a tensor in the structure."""

METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
"""Modules whose classes the metadata of torch.distributed.checkpoint consist of."""

HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}
"""Other names in them, each of which only makes a value."""


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_checkpoint(path: Path, other: Path) -> None:
    """Rename a checkpoint to ``other``, in place of the one there."""
    if path.is_dir() or other.is_dir():  # a folder cannot be replaced at once
        remove_checkpoint(other)
    path.replace(other)


Like = Callable[[str, torch.Size], Tensor | None]
"""Function from the name and the shape of a tensor in a checkpoint to a tensor that is sharded like the part wanted of it."""


def is_sharded(path: Path) -> bool:
    """Return whether a path is the folder of a sharded checkpoint."""
    return (path / STRUCTURE).is_file()


def save_sharded(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint into a folder; to be called on all ranks.

    Args:
        checkpoint: nested dictionaries, lists and tuples of tensors and plain values. Each rank writes its part of a sharded
            tensor; other tensors, and the plain values, are those of the first rank.
        folder: a new folder, on a file system that all ranks share.

    Raises:
        Exception: what prevented a rank from writing, on all ranks; if it was the structure, on the first.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter, save

    tensors: dict[str, Tensor] = {}
    structure = _split(checkpoint, "", tensors)
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        save(tensors, storage_writer=FileSystemWriter(folder))
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(structure, folder / STRUCTURE)


def load_sharded(folder: Path, like: Like = lambda name, shape: None) -> dict[str, Any]:
    """Read a checkpoint that :func:`save_sharded` wrote, on any number of ranks.

    Args:
        folder: its folder.
        like: returns, for the name of a tensor (its keys in the checkpoint, joined by ``/``) and its shape, a sharded tensor of
            which this rank wants the same part; None = the complete tensor. To be called on all ranks if tensors are sharded.

    Raises:
        Exception: of torch or pickle, if a file is damaged or missing.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    structure = torch.load(folder / STRUCTURE, map_location="cpu", weights_only=True)
    reader = _reader(folder)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        other = like(name, entry.size)
        tensors[name] = whole if other is None else torch.empty_like(other, dtype=whole.dtype)
    with _quiet():
        load(tensors, storage_reader=reader, planner=DefaultLoadPlanner())
    joined: dict[str, Any] = _join(structure, tensors)
    return joined


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore warnings, such as that there is no process group; raise the error of a rank as it is.

    torch wraps it in a CheckpointException, which no ``except Exception`` catches.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


def damaged_tensor(folder: Path) -> str | None:
    """Compare the tensors of a sharded checkpoint with their checksums; return the name of the first that differs.

    Raises:
        Exception: of pickle or zipfile, if a file is damaged otherwise.
    """
    for index, place in _reader(folder).read_metadata().storage_data.items():
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            stored = zipfile.ZipFile(
                io.BytesIO(file.read(place.length))
            )  # torch.save writes a zip file with CRC-32 checksums
        if stored.testzip() is not None:
            return str(index.fqn)
    return None


def map_tensors(checkpoint: Mapping[str, Any], function: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """Return a checkpoint with ``function(name, tensor)`` in place of each tensor."""
    tensors: dict[str, Tensor] = {}
    structure = _split(checkpoint, "", tensors)
    mapped: dict[str, Any] = _join(structure, {name: function(name, tensor) for name, tensor in tensors.items()})
    return mapped


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` with marks in place of its tensors, which are added to ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return MARK + name
    if isinstance(value, Mapping):
        return {key: _split(each, f"{name}/{key}" if name else str(key), tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_split(each, f"{name}/{i}", tensors) for i, each in enumerate(value))
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert :func:`_split`."""
    if isinstance(value, str) and value.startswith(MARK):
        return tensors[value.removeprefix(MARK)]
    if isinstance(value, Mapping):
        return {key: _join(each, tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_join(each, tensors) for each in value)
    return value


def _reader(folder: Path) -> Any:
    """Return torch's reader of a folder, which unpickles the metadata without running code from it."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **options: Any) -> Metadata:
            metadata: Metadata = _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


class _Unpickler(pickle.Unpickler):
    """Unpickler of the metadata, which consist of torch's classes for it, sizes, data types, layouts and paths."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in HARMLESS:
            return super().find_class(module, name)
        if "." not in name and module in METADATA_MODULES:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"the metadata contain {module}.{name}, which could run code")
