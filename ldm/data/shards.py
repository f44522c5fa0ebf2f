"""Shards: tar files in webdataset's layout, ``key.jpg`` beside ``key.txt``.

What else a sample may have: ``key.cls``, a class number; ``key.boxes.json``, a list of boxes [class, x0, y0, x1, y1]
with corners as shares of width and height; ``key.semantic.png``, a class number a pixel.

A shard on disk needs no streaming: its index, one pass over the headers, gives every sample by number. Order,
resume, ranks and workers are then arithmetic on sample numbers (see :mod:`ldm.data.stream`).
"""

from __future__ import annotations

import glob
import hashlib
import importlib.resources
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.conditioning.boxes import Box, read_boxes
from ldm.errors import DataError
from ldm.formats.tensors import write_atomically

SPLITS = ("train", "val", "test")
PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "avif")
EMOJI = "emoji"  # as a source: the shards that come with the package

BOXES, SEMANTIC = "boxes.json", "semantic.png"  # what follows a key's dot

_PICTURE, _TEXT, _CLASS, _BOXES, _SEMANTIC = range(5)
_MEMBERS = {
    **dict.fromkeys(PICTURE_SUFFIXES, _PICTURE),
    "txt": _TEXT,
    "cls": _CLASS,
    BOXES: _BOXES,
    SEMANTIC: _SEMANTIC,
}
_KINDS_OF_MEMBERS = len(set(_MEMBERS.values()))
_ON_ALL_OR_NONE = {_CLASS: "a class (.cls)", _BOXES: f"boxes (.{BOXES})", _SEMANTIC: f"a semantic map (.{SEMANTIC})"}
_BLOCK = 512  # bytes: tar's unit


@dataclass(frozen=True)
class Sample:
    """An image as stored: unique key, caption, encoded bytes and their file suffix; class number, boxes and map if any."""

    key: str
    text: str
    picture: bytes
    suffix: str
    label: int | None = None
    boxes: Sequence[Box] | None = None
    semantic: bytes | None = None


def write_shard(path: str | Path, samples: Iterable[Sample]) -> int:
    """Writes a shard atomically and returns the number of samples; equal samples give equal bytes."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in samples:
                members = {sample.suffix: sample.picture, "txt": sample.text.encode()}
                if sample.label is not None:
                    members["cls"] = str(sample.label).encode()
                if sample.boxes is not None:
                    members[BOXES] = json.dumps(sample.boxes).encode()
                if sample.semantic is not None:
                    members[SEMANTIC] = sample.semantic
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                count += 1

    write_atomically(path, write)
    return count


def find_shards(source: str | Sequence[str], split: str) -> list[Path]:
    """The shards that a source names, in order.

    Args:
        source: a ``.tar`` file, a folder of them, a pattern with ``*``, ``?``, ``[...]`` or ``{000..012}``, a
            list of those, or ``emoji`` for the packaged set.
        split: which of the packaged shards; other sources name their split by their path.

    Raises:
        DataError: a shard that does not exist, or a folder or pattern without any.
    """
    if not isinstance(source, str):
        return [path for part in source for path in find_shards(part, split)]
    if source == EMOJI:
        folder = Path(str(importlib.resources.files("ldm"))) / "assets" / "emoji"
        return sorted(folder.glob(f"emoji-{split}-*.tar"))
    return [path for pattern in _expanded(source) for path in _matches(pattern)]


def _expanded(source: str) -> list[str]:
    """``{000..002}`` and ``{a,b}`` written out, by webdataset."""
    if "{" not in source:
        return [source]
    from webdataset.shardlists import expand_urls  # slow to import

    try:
        return expand_urls(source)
    except ValueError as error:
        raise DataError(
            f"the shards {source!r} cannot be listed ({error}); close each brace, as in {{000..012}}."
        ) from None


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise DataError(f"the data folder {path} holds no .tar shards; make some with tools/prepare.py folder.")
        return found
    if path.is_file():
        return [path]
    if not glob.has_magic(pattern):
        raise DataError(f"the shard or data folder {path} does not exist; check the sources given under data.")
    found = sorted(Path(name) for name in glob.glob(str(path)))  # noqa: PTH207 (the pattern may be absolute)
    if not found:
        raise DataError(f"no shard matches {pattern}; check the sources given under data.")
    return found


class Shards:
    """Samples of several shards by number, read from disk when asked for.

    Args:
        paths: the shards, as :func:`find_shards` lists them.

    Attributes:
        keys: the key of each sample.
        lengths: the number of samples of each shard.
        labelled: whether the samples carry class numbers.
        boxed: whether they carry boxes.
        mapped: whether they carry semantic maps.

    Raises:
        DataError: a shard that is missing, ends early or is no tar; a sample without an image, or without
            both caption and class number; a key that comes twice; a set with no sample; class numbers, boxes or
            maps on some samples only.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.keys: list[str] = []
        self.lengths: list[int] = []
        spans: list[np.ndarray] = []
        for path in self.paths:
            found = _index(path)
            self.keys += found
            self.lengths.append(len(found))
            spans.append(np.array(list(found.values()), np.int64).reshape(-1, _KINDS_OF_MEMBERS, 2))
        # [n 5 2]: offset and size, in bytes, of each kind of member; size -1 where there is none.
        self._spans = np.concatenate(spans) if spans else np.zeros((0, _KINDS_OF_MEMBERS, 2), np.int64)
        self._shard = np.repeat(np.arange(len(self.paths)), self.lengths)
        if not self.keys:
            raise DataError(
                f"there is no sample in {', '.join(map(str, self.paths))}; make shards with tools/prepare.py."
            )
        twice, times = Counter(self.keys).most_common(1)[0]
        if times > 1:
            raise DataError(f"the key {twice!r} comes twice in the shards of {self.paths[0].parent}; list each once.")
        self.labelled, self.boxed, self.mapped = (self._all_have(member) for member in _ON_ALL_OR_NONE)

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, i: int) -> bytes:
        """The encoded image of sample ``i``."""
        return self._read(i, _PICTURE)

    def text(self, i: int) -> str:
        """The caption of sample ``i``; empty for one that has a class number alone."""
        try:
            return self._read(i, _TEXT).decode().strip()
        except UnicodeDecodeError:
            raise DataError(f"the caption of {self.where(i)} is not UTF-8; write the shard again.") from None

    def label(self, i: int) -> int:
        """The class number of sample ``i`` of a labelled set."""
        text = self._read(i, _CLASS)
        try:
            return int(text)
        except ValueError:
            raise DataError(
                f"the class of {self.where(i)} is {text!r}, not a whole number; write the shard again."
            ) from None

    def boxes(self, i: int) -> list[Box]:
        """The boxes of sample ``i`` of a boxed set."""
        try:
            return read_boxes(json.loads(self._read(i, _BOXES)))
        except (DataError, ValueError) as error:
            told = error if isinstance(error, DataError) else f"are no JSON ({error})"
            raise DataError(f"the boxes of {self.where(i)} {told}; write the shard again.") from None

    def semantic(self, i: int) -> bytes:
        """The encoded map of sample ``i`` of a mapped set."""
        return self._read(i, _SEMANTIC)

    def where(self, i: int) -> str:
        """Shard and key of sample ``i``, for messages."""
        return f"{self.keys[i]!r} in {self.paths[self._shard[i]]}"

    @property
    def fingerprint(self) -> str:
        """Changes with the keys, their order and where the members lie, but not with the shards' folder."""
        digest = hashlib.blake2b("\n".join(self.keys).encode(), digest_size=16)
        digest.update(self._spans.tobytes())
        return digest.hexdigest()

    def _all_have(self, member: int) -> bool:
        """Whether the samples have this kind of member; a DataError if only some do."""
        has = self._spans[:, member, 1] >= 0
        if has.any() and not has.all():
            lacking = self.keys[int(np.argmin(has))]
            raise DataError(
                f"samples of {self.paths[0].parent} have {_ON_ALL_OR_NONE[member]}, but {lacking!r} has none."
            )
        return bool(has.all())

    def _read(self, i: int, member: int) -> bytes:
        offset, size = self._spans[i, member]
        if size < 0:
            return b""
        path = self.paths[self._shard[i]]
        try:
            with path.open("rb") as file:  # opened anew: safe in forked workers, and no limit on the number of shards
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"cannot read the shard {path}: {error.strerror}.") from None
        if len(data) < size:
            raise DataError(f"the shard {path} has become shorter since it was opened; do not change shards in use.")
        return data


def _index(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Where the members of each sample of a shard lie, by key and in the shard's order."""
    samples: dict[str, list[tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for info in tar:
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                folder, slash, name = info.name.rpartition("/")
                stem, _, suffix = name.partition(".")  # webdataset's rule: a key ends at the name's first dot
                member = _MEMBERS.get(suffix.lower())
                if info.isreg() and member is not None:
                    spans = samples.setdefault(folder + slash + stem, [(0, -1)] * _KINDS_OF_MEMBERS)
                    spans[member] = (info.offset_data, info.size)
        with path.open("rb") as file:
            file.seek(end)
            whole = file.read(_BLOCK) == bytes(_BLOCK)
    except FileNotFoundError:
        raise DataError(f"the shard {path} does not exist; check the sources given under data.") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"the shard {path} ends early or is no tar file ({error}); copy or make it again.") from None
    if not whole:  # cut between two members, where the headers alone cannot tell
        raise DataError(f"the shard {path} ends early, after {len(samples)} samples; copy or make it again.")
    for key, spans in samples.items():
        if spans[_PICTURE][1] < 0:
            raise DataError(f"{key!r} in {path} has no image ({', '.join(PICTURE_SUFFIXES)}); make the shard again.")
        if spans[_TEXT][1] < 0 and spans[_CLASS][1] < 0:
            raise DataError(f"{key!r} in {path} has neither caption (.txt) nor class (.cls); make the shard again.")
    return samples
