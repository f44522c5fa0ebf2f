"""Reading and writing of tensor files: memory-mapped, without running code from the file, and written atomically.

Tensors of a file are views of its memory-mapped pages, which the operating system loads as values are read. Functions that
pass over all values once (conversion to another dtype, a check, a fingerprint) release the pages afterwards, so that reading
a file in another dtype needs little more memory than the result.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import CheckpointError, first_line
from ldm.formats.pickles import read_pickle
from ldm.formats.sharded_checkpoint import is_sharded
from ldm.nn.wrappers import WRAPPERS

SAFETENSORS, PICKLES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
"""File name suffixes of tensor files."""

T = TypeVar("T")

WRAPPED = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
"""Pattern of :data:`ldm.nn.wrappers.WRAPPERS` in names."""

QUANTIZED = re.compile(
    r"scaled_fp8|scale_(weight|input)|(weight|input)_scale|comfy_quant|(nested_)?(absmax|quant_map)|qweight|qzeros|SCB|bitsandbytes__\w+"
)
"""Last parts of the names of tensors without which quantized weights mean nothing."""

INDEX, CONFIG = "model_index.json", "config.json"
"""Index of a diffusers pipeline, and config file of one network in a diffusers or transformers folder."""

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", ("model", "pytorch_model")
STEMS = (DIFFUSERS, *TRANSFORMERS)
"""Names of the weight files in such a folder, without suffix."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file in the same folder with ``write``, sync it to disk and rename it to ``path``."""
    with written_atomically(path) as temporary:
        write(temporary)


def write_json(path: str | Path, values: Any, sort_keys: bool = False) -> None:
    """Write JSON, atomically."""
    text = json.dumps(values, indent=2, sort_keys=sort_keys) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def written_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder; after the block, unless it fails, sync it to disk and rename it to ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], checked: bool = False
) -> None:
    """Write a safetensors file atomically; tensors are stored contiguous, and those that share memory are stored separately.

    Args:
        path: the file.
        tensors: by name.
        metadata: of the file.
        checked: True if the tensors have passed :func:`check_writable` already, which reads all values.

    Raises:
        CheckpointError: a tensor is one that readers reject: not plain, or not finite. Then nothing is written.
    """
    if not checked:
        check_writable(tensors, path)
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.detach().cpu().contiguous()
        shared = contiguous.untyped_storage().data_ptr() in storages
        stored[name] = contiguous.clone() if shared else contiguous
        storages.add(stored[name].untyped_storage().data_ptr())

    def write(temporary: Path) -> None:
        try:
            save_file(stored, temporary, dict(metadata))
        except SafetensorError as error:
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise

    write_atomically(path, write)


def check_plain(tensors: Mapping[str, Tensor], path: object) -> None:
    """Reject tensors that cannot be written to ``path``: on the meta device, sparse, quantized, distributed.

    Raises:
        CheckpointError: the first such tensor is named.
    """
    for name, tensor in tensors.items():
        dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized
        if not dense or tensor.is_meta:  # quantized layers have entries of other types in their state
            kind = "on the meta device" if dense else f"of type {type(tensor).__name__}"
            raise CheckpointError(
                f"nothing is written to {path}, because {name} is {kind}, not a plain dense tensor with values; "
                "write the model before it is quantized, sharded or emptied."
            )


def check_writable(tensors: Mapping[str, Tensor], path: object) -> None:
    """Reject tensors that could not be read again from ``path``: as :func:`check_plain`, and those that are not finite."""
    check_plain(tensors, path)
    broken = _not_finite(tensors)
    if broken is not None:
        raise CheckpointError(
            f"nothing is written to {path}, because the weight {broken} holds NaN or infinite values in "
            f"{str(tensors[broken].dtype).removeprefix('torch.')}; use a checkpoint that is finite, or a dtype of larger range."
        )


def without_wrappers(tensors: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Return tensors by the names that they have without :data:`ldm.nn.wrappers.WRAPPERS`.

    Raises:
        CheckpointError: two tensors then have the same name.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = WRAPPED.sub("", name)
        if short in plain:
            raise CheckpointError(f"{source} holds {short} twice, once as {name}; remove one of them.")
        plain[short] = tensor
    return plain


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; a pickle has none.

    Raises:
        CheckpointError: the file is missing or is not a tensor file.
    """
    if _ending(path) in PICKLES:
        return {}
    return _safetensors(path, lambda file: file.metadata() or {})


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file, as :func:`read_file` does."""
    return read_file(path)[0]


def read_file(path: str | Path, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a file as views of its memory-mapped pages, and its metadata.

    The tensors are on the CPU, in the stored dtype; no values are read yet. Names are without :data:`ldm.nn.wrappers.WRAPPERS`.

    Args:
        path: a .safetensors file, or a pickle (.ckpt, .pt, .pth, .bin) of a state dict, bare or under a key of
            :data:`ldm.formats.pickles.NESTED`; entries of a pickle that are not tensors are ignored. Only a checkpoint of a
            training has metadata among the pickles; see :mod:`ldm.formats.training_checkpoint`.
        ema: use the averaged weights of a checkpoint of a training.

    Raises:
        CheckpointError: the file is missing, broken or not a tensor file, is a pickle that would run code, or holds quantized
            weights.
    """
    stored, metadata = read_pickle(Path(path), ema) if _ending(path) in PICKLES else _safetensors(path, _all)
    tensors = without_wrappers(stored, path)
    if tensors.keys() != stored.keys() and "fingerprint" in metadata:
        metadata["fingerprint"] = ""  # it is that of the names in the file
    for name, tensor in tensors.items():
        if QUANTIZED.fullmatch(name.rpartition(".")[2]):
            raise CheckpointError(
                f"{path} holds quantized weights ({name}), which ldm does not read; use a file in fp16, bf16 or fp32."
            )
        if not name.isprintable() or len(name) > 500:
            raise CheckpointError(
                f"{path} holds a tensor with the invalid name {name[:100]!r}; download the file again."
            )
        if tensor.dtype == torch.float4_e2m1fn_x2:
            raise CheckpointError(
                f"{path}: torch cannot compute with the dtype F4 of {name}; use a file with F16 or BF16."
            )
    return tensors, metadata


def read_weights(
    folder: str | Path, stem: str | tuple[str, ...] = DIFFUSERS, variant: str | None = None
) -> tuple[dict[str, Tensor], list[Path]]:
    """Read the weights in a diffusers or transformers folder, as :func:`read_tensors` does, and return also their files.

    A .safetensors file is preferred to a pickle, the default variant to the fp16 variant; each may be one file or an index
    with its shards.

    Args:
        folder: folder of one part of a model.
        stem: name of its files without suffix (:data:`STEMS`); of several, the first that exists.
        variant: variant that is preferred to all others, if the folder has it.

    Raises:
        CheckpointError: there are no weights, or the index does not match its shards.
    """
    folder = Path(folder)
    stems = (stem,) if isinstance(stem, str) else stem
    endings = (SAFETENSORS[1:], "bin")
    usual = [(ending, each) for ending in endings for each in ("", "fp16.")]
    for ending, part in [(ending, f"{variant}.") for ending in endings if variant] + usual:
        for name in stems:
            single, index = folder / f"{name}.{part}{ending}", folder / f"{name}.{ending}.index.{part}json"
            if single.is_file():
                return read_tensors(single), [single]
            if index.is_file():
                return _sharded(index)
    raise CheckpointError(f"{folder} holds no weights, such as {stems[0]}{SAFETENSORS}; download the folder again.")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the object (mapping) in a JSON file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or does not hold an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: invalid JSON or invalid UTF-8
        raise CheckpointError(f"{path} cannot be read as JSON ({first_line(error)}); download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object; download it again.")
    return content


def to_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert a floating-point tensor to ``dtype`` (None: unchanged) and release the pages that were read; keep any other."""
    if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    _release_pages(tensor)
    return converted


def channels_last(tensor: Tensor) -> Tensor:
    """Convert a 4-D tensor to the channels_last memory format and release the pages that were read; keep any other."""
    if tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    converted = tensor.contiguous(memory_format=torch.channels_last)
    _release_pages(tensor)
    return converted


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Reject weights that are not finite.

    Raises:
        CheckpointError: a weight holds NaN or infinite values; the first is named.
    """
    broken = _not_finite(tensors)
    if broken is not None:
        raise CheckpointError(f"{source}: the weight {broken} holds NaN or infinite values; download the file again.")


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinite values; None if there is none."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float() if tensor.itemsize == 1 else tensor  # torch can neither sum nor test fp8
        # A sum is the fastest test of all values; since it may overflow, the values are then tested one by one.
        if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
            return name
        _release_pages(tensor)
    return None


def fingerprint(tensors: Mapping[str, Tensor], meaning: Mapping[str, Any]) -> str:
    """Return 16 hex digits that depend on all weights (names, shapes, values as fp32) and on ``meaning`` (JSON values)."""
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
        _release_pages(tensors[name])
    return digest.hexdigest()[:16]


def _ending(path: str | Path) -> str:
    """Return the suffix of a tensor file after checking that it exists and does not begin like another kind of file."""
    path = Path(path)
    if is_sharded(path):
        return path.suffix
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the weight file in it.")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    if path.suffix not in (SAFETENSORS, *PICKLES):
        raise CheckpointError(f"{path} is not a weight file; their names end in {', '.join((SAFETENSORS, *PICKLES))}.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}); make it readable.") from None
    if not start:
        raise CheckpointError(f"{path} is empty; download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself; fetch it with git lfs pull.")
    if start.lstrip().startswith((b"<!", b"<html", b"<HTML", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not a weight file; download the file that the page links to.")
    return path.suffix


def _safetensors(path: str | Path, read: Callable[[Any], T]) -> T:
    try:
        with safe_open(str(path), "pt") as file:
            with Path(path).open("rb") as header:  # safe_open has checked that it is JSON of a bounded length
                json.loads(header.read(int.from_bytes(header.read(8), "little")), object_pairs_hook=_once)
            return read(file)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({first_line(error)}); download or write it again."
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for name, value in pairs:
        if name in section:
            raise ValueError(f"{name[:100]!r} occurs twice in its header")
        section[name] = value
    return section


def _all(file: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is not a mapping)
    return tensors, file.metadata() or {}


def _sharded(index: Path) -> tuple[dict[str, Tensor], list[Path]]:
    shard_by_name = read_json(index).get("weight_map")
    if not isinstance(shard_by_name, dict) or not all(isinstance(shard, str) for shard in shard_by_name.values()):
        raise CheckpointError(f"{index} has no weight_map from weights to files; download it again.")
    tensors: dict[str, Tensor] = {}
    shards = sorted(set(shard_by_name.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.isprintable():
            raise CheckpointError(
                f"{index} names {shard!r}, which is not a file in the same folder; download the folder again."
            )
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{path}, which {index.name} names, is missing; download the folder again.")
        held = read_tensors(path)
        for name in held:
            if name in tensors:
                raise CheckpointError(
                    f"{path}: the weight {name} is also in another file of {index.name}; download the folder again."
                )
        for name in (name for name, place in shard_by_name.items() if place == shard and name not in held):
            raise CheckpointError(
                f"{path}: the weight {name!r}, which {index.name} assigns to this file, is missing; download it again."
            )
        tensors |= held
    return tensors, [index.parent / shard for shard in shards]


def _release_pages(tensor: Tensor) -> None:
    """Release the memory-mapped pages that lie within ``tensor`` (MADV_DONTNEED); later reads load them again from the file.

    Memory that is not a mapped file, or that was written to since, is left alone; Linux's pagemap tells them apart.
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
