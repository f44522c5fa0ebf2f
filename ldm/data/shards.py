"""Shards: tar files in webdataset's layout, ``key.jpg`` next to ``key.txt``.

A sample is an image with members of the modalities that have a suffix, such as ``key.cls`` (a class number) or
``key.boxes.json``; see :mod:`ldm.modalities`.

A shard on disk needs no streaming: its index, made in one pass over the headers, gives access to every sample by number.
Order, resume, ranks and workers are then arithmetic on sample numbers (see :mod:`ldm.data.stream`).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.resources
import io
import itertools
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.bad_samples import BadSample, Reason, dropped, duplicates, is_cut
from ldm.data.shard_set import check_complete, check_replaced, check_shards
from ldm.errors import DataError, StorageError
from ldm.formats.tensors import write_atomically
from ldm.modalities import MODALITIES, Modality
from ldm.modalities.caption import CAPTION
from ldm.paths import expanded

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (
    "jpg",
    "jpeg",
    "jfif",
    "png",
    "webp",
    "avif",
    "heic",
    "heif",
    "jp2",
    "bmp",
    "gif",
    "tga",
    "tif",
    "tiff",
)
EMOJI = "emoji"  # as a source: the shards shipped with the package

_CAPTION = "txt"
_FIRST = (_CAPTION, "cls", "boxes.json", "semantic.png")
"""Suffixes that precede others in shards and fingerprints; fingerprints have always covered them, present or not."""

_STORED = {modality.suffix: modality for modality in MODALITIES.values() if modality.suffix is not None}

MEMBERS: dict[str, Modality] = {suffix: _STORED[suffix] for suffix in (*_FIRST, *sorted(_STORED.keys() - {*_FIRST}))}
"""Modalities that are stored, by suffix, in the order of their members in a shard."""

CHECKSUM = "__checksum__"

_IMAGE = 0  # column of the spans; those of MEMBERS follow
_COLUMNS = {**dict.fromkeys(IMAGE_SUFFIXES, _IMAGE), **{suffix: i for i, suffix in enumerate(MEMBERS, start=1)}}
_BLOCK = 512  # bytes: tar's unit
_TAIL = 256  # bytes of a member that its fingerprint covers
_HASHED = 100_000  # samples of a set whose bytes its fingerprint covers


@dataclass(frozen=True)
class Sample:
    """An image as stored, with its annotations.

    Attributes:
        key: unique name.
        text: caption.
        image: encoded bytes.
        suffix: suffix of the image's file.
        annotations: values of further modalities by key: as :meth:`Modality.encode` takes them, or already encoded.
    """

    key: str
    text: str
    image: bytes
    suffix: str
    annotations: Mapping[str, Any] = field(default_factory=dict)


def write_shard(path: str | Path, samples: Iterable[Sample]) -> int:
    """Write a shard atomically and return the number of samples; equal samples give equal bytes.

    The last member, ``__checksum__``, is the BLAKE2b hash of the names and contents of the others; webdataset ignores members
    with such names.
    """
    count, checksum = 0, hashlib.blake2b(digest_size=16)

    def write(temporary: Path) -> None:
        nonlocal count
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in samples:
                values = {"text": sample.text, **sample.annotations}
                members = {sample.suffix: sample.image}
                for suffix, modality in MEMBERS.items():
                    if modality.key in values:
                        value = values[modality.key]
                        members[suffix] = value if isinstance(value, bytes) else modality.encode(value)
                for suffix, data in members.items():
                    name = f"{sample.key}.{suffix}"
                    checksum.update(f"{name}/{len(data)}/".encode() + data)
                    _add(tar, name, data)
                count += 1
            _add(tar, CHECKSUM, checksum.hexdigest().encode())

    write_atomically(path, write)
    return count


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def checksum_of(path: Path) -> str | None:
    """Return the checksum that a shard contains; None if it has none.

    Raises:
        DataError: the shard cannot be read.
    """
    return _index(path).checksum


def find_shards(source: str | Sequence[str], split: str) -> list[Path]:
    """Return the paths of the shards that a source names, in order.

    Args:
        source: a ``.tar`` file, a folder of them, a pattern with ``*``, ``?``, ``[...]`` or ``{000..012}``, a
            list of those, or ``emoji`` for the packaged set.
        split: which of the packaged shards; other sources name their split by their path.

    Raises:
        DataError: a shard that does not exist, or a folder or pattern without any, or shards of an incomplete set.
    """
    if not isinstance(source, str):
        return [path for part in source for path in find_shards(part, split)]
    if source == EMOJI:
        folder = Path(str(importlib.resources.files("ldm"))) / "assets" / "emoji"
        return sorted(folder.glob(f"emoji-{split}-*.tar"))
    return [path for pattern in _expanded(expanded(source)) for path in _matches(pattern)]


def _expanded(source: str) -> list[str]:
    """Expand ``{000..002}`` and ``{a,b}`` by webdataset."""
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
    path = Path(pattern)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        check_complete(path, found)
        if not found:
            raise DataError(f"the data folder {path} contains no .tar shards; make them with tools/prepare.py folder.")
        return found
    if path.is_file():
        return [path]
    if not glob.has_magic(pattern):
        check_replaced(path.parent)
        raise DataError(f"the shard or data folder {path} does not exist; check the sources given under data.")
    found = sorted(Path(name) for name in glob.glob(str(path)))  # noqa: PTH207 (the pattern may be absolute)
    if not found:
        raise DataError(f"no shard matches {pattern}; check the sources given under data.")
    return found


class Shards:
    """Samples of several shards by number, read from disk when needed.

    A sample without an image, or without both caption and class number, is skipped, and so is one without a caption if others
    have one, the incomplete one at the end of a truncated shard, and the later ones of the same key in a shard; a warning gives
    their number. If a key occurs in several shards, all keys are preceded by the name of their shard.

    Args:
        paths: the shards, as :func:`find_shards` lists them.

    Attributes:
        keys: the key of each sample.
        lengths: the number of samples of each shard.
        modalities: those that the samples have, by key.
        dropped: the samples that are skipped.

    Raises:
        DataError: a shard that is missing, not a tar file, listed twice, or other than a report lists it; a set without
            complete samples; a modality, other than captions, that some samples have and some lack.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        _check_distinct(self.paths)
        indices = [_index(path) for path in self.paths]
        check_shards({path: index.checksum for path, index in zip(self.paths, indices, strict=True)})
        self._modified = [index.modified for index in indices]
        self.keys = [key for index in indices for key in index.keys]
        self._shard = np.repeat(np.arange(len(self.paths)), [len(index.keys) for index in indices])
        # [n 1+m 2]: offset and size, in bytes, of the image and of each kind of member; size -1 if it is missing.
        self._spans = np.concatenate([_array([]), *(index.spans for index in indices)])
        self.dropped = [bad for index in indices for bad in index.dropped]
        _warn_of(self.dropped)
        if not self.keys:
            raise DataError(
                f"there is no sample in {', '.join(map(str, self.paths))}; make shards with tools/prepare.py."
            )
        self._keep(self._has(_IMAGE), f"no image ({', '.join(IMAGE_SUFFIXES)})", Reason.NO_IMAGE)
        describing = {suffix: modality for suffix, modality in MEMBERS.items() if modality.describes}
        nouns = " nor ".join(f"{modality.noun} (.{suffix})" for suffix, modality in describing.items())
        described = np.any([self._has(_COLUMNS[suffix]) for suffix in describing], axis=0)
        self._keep(described, f"neither {nouns}", Reason.NO_CAPTION)
        self.modalities = {modality.key: modality for modality in MEMBERS.values() if self._in_all(modality)}
        if CAPTION.key in self.modalities:
            self._keep(self._has(_COLUMNS[_CAPTION]), f"no {CAPTION.noun} (.{_CAPTION})", Reason.NO_CAPTION)
        self.lengths: list[int] = np.bincount(self._shard, minlength=len(self.paths)).tolist()
        if len(set(self.keys)) < len(self.keys):
            names = _names_of(self.paths)
            self.keys = [f"{names[shard]}/{key}" for shard, key in zip(self._shard, self.keys, strict=True)]

    def _has(self, column: int) -> np.ndarray:
        """Return ``[n]`` of bool: whether each sample has this member."""
        has: np.ndarray = self._spans[:, column, 1] >= 0
        return has

    def _keep(self, complete: np.ndarray, lack: str, reason: Reason) -> None:
        """Keep the samples that are complete, and warn of the others.

        Raises:
            DataError: none is.
        """
        if complete.all():
            return
        first = self.where(int(np.argmin(complete)))
        if not complete.any():
            raise DataError(f"{first} has {lack}; create the shard again.")
        warnings.warn(
            f"{np.sum(~complete)} of {len(self)} samples are skipped, the first of them {first}: they have {lack}.",
            stacklevel=4,
        )
        self.dropped += dropped(reason, f"has {lack}", np.flatnonzero(~complete), self.keys, self.path)
        self.keys = list(itertools.compress(self.keys, complete))
        self._shard, self._spans = self._shard[complete], self._spans[complete]

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> bytes:
        """Return the encoded image of sample ``i``."""
        return self._read(i, _IMAGE)

    def text(self, i: int) -> str:
        """Return the caption of sample ``i``; empty if it has none."""
        caption: str = self.value(i, CAPTION)
        return caption

    def encoded(self, i: int, modality: Modality) -> bytes:
        """Return the member of sample ``i`` with its value of a modality, as stored; empty if it has none."""
        assert modality.suffix is not None, f"{modality.noun} is not stored"
        return self._read(i, _COLUMNS[modality.suffix])

    def value(self, i: int, modality: Modality) -> Any:
        """Return the decoded value of a modality for sample ``i``.

        Raises:
            DataError: the member is malformed.
        """
        try:
            return modality.decode(self.encoded(i, modality))
        except DataError as error:
            raise DataError(f"the {modality.noun} of {self.where(i)} {error}; write the shard again.") from None

    def where(self, i: int) -> str:
        """Return the shard and key of sample ``i``, for messages."""
        return f"{self.keys[i]!r} in {self.path(i)}"

    def path(self, i: int) -> str:
        """Return the path of the shard of sample ``i``."""
        return str(self.paths[self._shard[i]])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Text that depends on the keys, their order, and the offsets and last bytes of members, not on the shards' folder."""
        digest = hashlib.blake2b("\n".join(self.keys).encode(errors="surrogateescape"), digest_size=16)
        digest.update(self._tails())
        always = 1 + len(_FIRST)
        digest.update(self._spans[:, :always].tobytes())
        for suffix, modality in list(MEMBERS.items())[len(_FIRST) :]:
            if modality.key in self.modalities:
                digest.update(suffix.encode() + self._spans[:, _COLUMNS[suffix]].tobytes())
        return digest.hexdigest()

    def _tails(self) -> bytes:
        """Return a hash of the last ``_TAIL`` bytes of the members of up to ``_HASHED`` samples.

        All of a short caption, and of an image its checksum (PNG) or the end of its entropy code, which any change alters.
        """
        digest, first = hashlib.blake2b(digest_size=16), 0
        every = -(-len(self.keys) // _HASHED)
        for path, length in zip(self.paths, self.lengths, strict=True):
            with path.open("rb") as file:
                for offset, size in self._spans[first : first + length : every].reshape(-1, 2).tolist():
                    if size > 0:
                        file.seek(offset + max(0, size - _TAIL))
                        digest.update(file.read(min(size, _TAIL)))
            first += length
        return digest.digest()

    def _in_all(self, modality: Modality) -> bool:
        """Return True if the samples have a modality.

        Raises:
            DataError: only some of them have one that is required for all.
        """
        assert modality.suffix is not None
        has = self._has(_COLUMNS[modality.suffix])
        if has.any() and not has.all() and not modality.optional:
            lacking = self.keys[int(np.argmin(has))]
            raise DataError(f"samples of {self.paths[0].parent} have {modality.file}, but {lacking!r} has none.")
        return bool(has.any())

    def _read(self, i: int, column: int) -> bytes:
        offset, size = self._spans[i, column]
        if size < 0:
            return b""
        path = self.paths[self._shard[i]]
        try:
            with path.open(
                "rb"
            ) as file:  # opened each time: safe in forked workers, and no limit on the number of shards
                file.seek(offset)
                data = file.read(size)
                modified = os.fstat(file.fileno()).st_mtime_ns
        except OSError as error:
            raise StorageError(f"cannot read the shard {path}: {error.strerror}.") from None
        if len(data) < size:
            raise StorageError(f"the shard {path} has become shorter since it was opened; do not modify shards in use.")
        if modified != self._modified[self._shard[i]]:
            raise StorageError(f"the shard {path} was replaced since it was opened; run the same command again.")
        return data


def _check_distinct(paths: Sequence[Path]) -> None:
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise DataError(f"the shard {path} occurs twice among the sources of the data; list each shard once.")


def _names_of(paths: Sequence[Path]) -> list[str]:
    """Return names that tell shards apart: their paths relative to the folder that contains them all, without suffix."""
    folder = os.path.commonpath([path.resolve().parent for path in paths])
    return [path.resolve().relative_to(folder).with_suffix("").as_posix() for path in paths]


def _warn_of(bad: Sequence[BadSample]) -> None:
    for reason in dict.fromkeys(each.reason for each in bad):
        found = [each for each in bad if each.reason == reason]
        warnings.warn(
            f"{sum(each.count for each in found)} samples are skipped, the first of them {found[0].where}: {found[0].detail}.",
            stacklevel=4,
        )


@dataclass(frozen=True)
class _Index:
    """Content of a shard.

    Attributes:
        path: the file.
        keys: keys of the samples, in the shard's order.
        spans: ``[n 1+m 2]``, as those of :class:`Shards`.
        dropped: the samples that the shard has no complete content of.
        checksum: checksum that the shard contains.
        modified: time at which the file was modified, in nanoseconds.
    """

    path: Path
    keys: list[str]
    spans: np.ndarray
    dropped: list[BadSample]
    checksum: str | None
    modified: int


def _index(path: Path) -> _Index:
    checksum: str | None = None
    samples: dict[str, list[tuple[int, int]]] = {}
    repeated: list[tuple[str, str]] = []  # key and suffix
    end, key = 0, ""
    try:
        status = path.stat()
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                content = tar.extractfile(info) if info.name == CHECKSUM else None
                checksum = checksum if content is None else content.read(64).decode(errors="replace")
                folder, slash, name = info.name.rpartition("/")
                stem, _, suffix = name.partition(".")  # as in webdataset, a key ends at the name's first dot
                column = _COLUMNS.get(suffix.lower())
                if info.isreg() and column is not None:
                    key = folder + slash + stem
                    spans = samples.setdefault(key, [(0, -1)] * (1 + len(MEMBERS)))
                    if spans[column][1] < 0:
                        spans[column] = (info.offset_data, info.size)
                    else:
                        repeated.append((key, suffix))
        with path.open("rb") as file:
            file.seek(end)
            complete = file.read(_BLOCK) == bytes(_BLOCK)
    except FileNotFoundError:
        raise DataError(f"the shard {path} does not exist; check the sources given under data.") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        if not end and status.st_size >= _BLOCK:
            raise DataError(
                f"the shard {path} is truncated or not a tar file ({error}); copy or create it again."
            ) from None
        complete = False
    bad = duplicates(path, repeated)
    if not complete:  # truncated between two members, which the headers alone do not show
        last = next(reversed(samples), "")
        cut = last if samples and key == last and is_cut(list(samples.values()), status.st_size) else ""
        samples.pop(cut, None)
        detail = f"the shard is truncated after {len(samples)} samples"
        bad.append(BadSample(Reason.TRUNCATED_SHARD, cut, str(path), detail))
    return _Index(path, list(samples), _array(list(samples.values())), bad, checksum, status.st_mtime_ns)


def _array(spans: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
    return np.array(spans, np.int64).reshape(-1, 1 + len(MEMBERS), 2)
