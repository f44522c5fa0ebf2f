"""The layout of shards: tar files as webdataset has them, ``key.jpg`` next to ``key.txt``.

A sample is an image with members of the modalities that have a suffix, such as ``key.cls`` (a class number) or
``key.boxes.json``; see :mod:`ldm.modalities`. ``key.json``, as img2dataset writes it, holds further fields of a sample.
Encoded samples have ``key.latents.safetensors`` instead of an image; see :mod:`ldm.data.encoded`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.bad_samples import BadSample, Reason, duplicates, is_cut
from ldm.data.sample_table import SIDECAR, SampleTable
from ldm.errors import DataError
from ldm.formats.tensors import written_atomically
from ldm.modalities import MODALITIES, Modality
from ldm.modalities.caption import CAPTION

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

FIRST = (CAPTION.suffix or "", "cls", "boxes.json", "semantic.png")
"""Suffixes that precede others in shards and fingerprints; fingerprints have always covered them, present or not."""

_STORED = {modality.suffix: modality for modality in MODALITIES.values() if modality.suffix is not None}

MEMBERS: dict[str, Modality] = {suffix: _STORED[suffix] for suffix in (*FIRST, *sorted(_STORED.keys() - {*FIRST}))}
"""Modalities that are stored, by suffix, in the order of their members in a shard."""

IMAGE = "image"
"""Name of the column of images, whose suffixes vary; the other members go by their suffix."""

LATENTS, STATES = "latents.safetensors", "text.safetensors"
"""Suffixes of the posteriors and of the outputs of text encoders of an encoded sample."""

ORIGINAL_SIZE = "size"
"""Name of the tensor in ``latents.safetensors`` with width and height of the image."""

CHECKSUM = "__checksum__"

_COLUMNS = {
    **dict.fromkeys(IMAGE_SUFFIXES, IMAGE),
    **{suffix: suffix for suffix in (*MEMBERS, SIDECAR, LATENTS, STATES)},
}
_BLOCK = 512  # bytes: tar's unit
_LARGEST = 2**31 - 1  # bytes of a member


@dataclass(frozen=True)
class Sample:
    """An image as stored, with its annotations.

    Attributes:
        key: unique name.
        text: caption; None: the sample has none.
        image: encoded bytes.
        suffix: suffix of the image's file.
        annotations: values of further modalities by key: as :meth:`Modality.encode` takes them, or already encoded.
    """

    key: str
    text: str | None
    image: bytes
    suffix: str
    annotations: Mapping[str, Any] = field(default_factory=dict)

    def members(self) -> dict[str, bytes]:
        """Return the contents of its files by suffix."""
        values = {**({} if self.text is None else {CAPTION.key: self.text}), **self.annotations}
        members = {self.suffix: self.image}
        for suffix, modality in MEMBERS.items():
            if modality.key in values:
                value = values[modality.key]
                members[suffix] = value if isinstance(value, bytes) else modality.encode(value)
        return members


def write_shard(path: str | Path, samples: Iterable[Sample]) -> int:
    """Write a shard atomically and return the number of samples; equal samples give equal bytes.

    The last member, ``__checksum__``, is the BLAKE2b hash of the names and contents of the others; webdataset ignores members
    with such names.
    """
    with written_atomically(path) as temporary, ShardWriter(temporary) as writer:
        for sample in samples:
            writer.add(sample.key, sample.members())
    return writer.count


class ShardWriter:
    """Writer of a shard, sample by sample; see :func:`write_shard`.

    Args:
        file: the file to write, which is complete when the ``with`` block ends.

    Attributes:
        count: number of samples so far.
    """

    def __init__(self, file: Path):
        self.count = 0
        self._checksum = hashlib.blake2b(digest_size=16)
        self._tar = tarfile.open(file, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed by __exit__)

    @property
    def checksum(self) -> str:
        """Checksum of the samples so far."""
        return self._checksum.hexdigest()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.ExitStack() as stack:
            stack.push(self._tar)
            if error == (None, None, None):
                self._add(CHECKSUM, self.checksum.encode())

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample, given by its members by suffix."""
        for suffix, data in members.items():
            name = f"{key}.{suffix}"
            self._checksum.update(f"{name}/{len(data)}/".encode() + data)
            self._add(name, data)
        self.count += 1

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


@dataclass(frozen=True)
class ShardContent:
    """Content of a shard, as its headers give it.

    Attributes:
        table: its samples.
        dropped: the samples that the shard has no complete content of.
        checksum: checksum that the shard contains; None if it has none.
        modified: time at which the file was modified, in nanoseconds.
    """

    table: SampleTable
    dropped: list[BadSample]
    checksum: str | None
    modified: int


def scan_shard(path: Path, visit: Callable[[int, str, bytes], None] | None = None) -> ShardContent:
    """Read the headers of a shard; of a truncated one, the samples before the cut are used.

    Args:
        path: the shard.
        visit: called with the row, the column and the content of each member that is used. None reads no content.

    Raises:
        DataError: the shard is missing or not a tar file.
    """
    checksum: str | None = None
    rows: dict[str, int] = {}
    spans: dict[str, dict[str, tuple[int, int]]] = {}  # by column and key
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
                if not info.isreg() or column is None:
                    continue
                key = folder + slash + stem
                if key in spans.setdefault(column, {}):
                    repeated.append((key, suffix))
                    continue
                spans[column][key] = (info.offset_data, info.size)
                if column != SIDECAR:  # which is no sample without an image
                    rows.setdefault(key, len(rows))
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
        last = next(reversed(rows), "")
        compared = dict.fromkeys((*list(rows)[:1], last))
        members_of = [[by_key.get(each, (0, -1)) for by_key in spans.values()] for each in compared]
        cut = last if rows and key == last and is_cut(members_of, status.st_size) else ""
        rows.pop(cut, None)
        detail = f"the shard is truncated after {len(rows)} samples"
        bad.append(BadSample(Reason.TRUNCATED_SHARD, cut, str(path), detail))
    if visit is not None:
        used = sorted(
            (span, column, key) for column, by_key in spans.items() for key, span in by_key.items() if key in rows
        )
        with path.open("rb") as file:
            for (offset, size), column, key in used:
                file.seek(offset)
                visit(rows[key], column, file.read(size))
    members = {}
    for column, by_key in spans.items():
        pairs = np.array([by_key.get(key, (0, -1)) for key in rows], np.int64).reshape(-1, 2)
        if pairs[:, 1].max(initial=-1) > _LARGEST:
            raise DataError(f"the shard {path} has a member of more than 2 GiB, which is not an image; leave it out.")
        if (pairs[:, 1] >= 0).any():
            members[column] = pairs[:, 0].copy(), pairs[:, 1].astype(np.int32)
    table = SampleTable.of(list(rows), [len(rows)], members)
    return ShardContent(table, bad, checksum, status.st_mtime_ns)


def checksum_of(path: Path) -> str | None:
    """Return the checksum that a shard contains; None if it has none.

    Raises:
        DataError: the shard cannot be read.
    """
    return scan_shard(path).checksum
