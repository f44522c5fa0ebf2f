"""Writing of encoded samples as shards with an index, which can be continued after an interruption."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.bad_samples import BadSample
from ldm.data.encoded import EncodedConfig
from ldm.data.encoded_source import EMPTY, check_encoding
from ldm.data.encoding import EncodedSample, Encoder, Engine
from ldm.data.indexing import fingerprint_of_shards, join_parts, stamp_of, write_part
from ldm.data.measures import IndexOptions
from ldm.data.shard_format import ShardWriter
from ldm.data.shard_index import ShardIndex, write_index
from ldm.data.shard_set import INDEX
from ldm.data.storage import Location, checksum, download, exists, joined, remove_folder, shown, upload
from ldm.errors import DataError
from ldm.formats.tensors import write_atomically, written_atomically

PARTS = "parts"
"""Folder of the rows of the index, a file for each finished shard; it exists while the encoding is incomplete."""


class EncodedShards:
    """Shards of encoded samples in a folder, of which each is written once.

    A finished shard has a file in :data:`PARTS`, with its rows of the index. The index is written at the end.

    Args:
        folder: folder of the split.
        encoding: what the samples depend on; see :meth:`EncodedSource.encoding`.
        config: sizes of batches and shards.
        samples: number of samples of each source of a mixture, or of all; a shard holds samples of one source.
    """

    def __init__(self, folder: Location, encoding: Mapping[str, Any], config: EncodedConfig, samples: Sequence[int]):
        if isinstance(folder, str) and folder.startswith("http"):
            raise DataError(f"nothing can be written to {shown(folder)}; give a local folder or a bucket (s3://).")
        self.folder, self.batch_size, size = folder, config.batch_size, config.shard_size
        self._ranges = [
            (source, first, min(first + size, end))
            for source, (start, end) in enumerate(itertools.pairwise(np.cumsum((0, *samples)).tolist()))
            for first in range(start, end, size)
        ]
        self.encoding = {**encoding, "batch_size": config.batch_size, "shard_size": config.shard_size}

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._ranges)

    def index_of(self, number: int) -> np.ndarray:
        """Return the numbers of the samples of a shard."""
        _, first, end = self._ranges[number]
        return np.arange(first, end)

    def by_source(self, numbers: Iterable[int]) -> list[list[int]]:
        """Return numbers of shards, which ascend, for each source."""
        return [list(group) for _, group in itertools.groupby(numbers, lambda number: self._ranges[number][0])]

    def finished(self) -> bool:
        """Return True if the index exists.

        Raises:
            DataError: it is that of another encoding.
        """
        if not exists(joined(self.folder, INDEX)):
            return False
        check_encoding(self.folder, self.encoding, ShardIndex(joined(self.folder, INDEX)).encoding)
        return True

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Return those of the shards that are not finished.

        Raises:
            DataError: one is that of another encoding.
        """
        return [number for number in numbers if not self._is_made(number)]

    def write(self, number: int, content: Sequence[EncodedSample | BadSample]) -> None:
        """Write a shard, then its rows of the index."""
        good = [(each.key, each.members) for each in content if isinstance(each, EncodedSample)]
        bad = [replace(each, index=None) for each in content if isinstance(each, BadSample)]
        location, part = self._shard(number), self._part(number)
        with _local(location) as path:
            with written_atomically(path) as temporary, ShardWriter(temporary) as writer:
                for key, members in good:
                    writer.add(key, members)
            if isinstance(location, str):
                upload(path, location)
            digest, options = checksum(path), IndexOptions(fields=())
            # After the shard, since it tells that the shard is complete.
            write_file(part, lambda rows: write_part(location, path, digest, rows, self.encoding, options, bad))

    def finish(self) -> ShardIndex:
        """Write the index of all shards, which are finished, and return it."""
        target = joined(self.folder, INDEX)
        with tempfile.TemporaryDirectory() as temporary:
            parts = [self._copied(number, Path(temporary)) for number in range(len(self))]
            table, shards = join_parts(parts)
            if not len(table):
                bad = next(each for shard in shards for each in shard.dropped)
                raise DataError(
                    f"none of {self._ranges[-1][2]} samples can be used, the first of them {bad.where}: {bad.detail}."
                )

            def write(path: Path) -> None:
                write_index(
                    path,
                    table,
                    shards,
                    fingerprint=fingerprint_of_shards(shards),
                    unique=True,
                    encoding=self.encoding,
                )

            write_file(target, write)
        return ShardIndex(target)

    def clean(self) -> None:
        """Remove the rows of the finished shards, and incomplete files that a kill has left; the index exists."""
        parts = joined(self.folder, PARTS)
        if isinstance(parts, str):
            remove_folder(parts)
            return
        shutil.rmtree(parts, ignore_errors=True)
        for path in parts.parent.glob(".*"):
            path.unlink()

    def _shard(self, number: int) -> Location:
        return joined(self.folder, f"{number:06d}.tar")

    def _part(self, number: int) -> Location:
        return joined(joined(self.folder, PARTS), f"{number:06d}.parquet")

    def _is_made(self, number: int) -> bool:
        if not exists(self._part(number)):
            return False
        with tempfile.TemporaryDirectory() as temporary:
            stamp = stamp_of(self._copied(number, Path(temporary)))
        if stamp is not None:
            check_encoding(self.folder, self.encoding, stamp)
        return stamp is not None

    def _copied(self, number: int, folder: Path) -> Path:
        """Return the rows of a shard as a local file, copied to a folder if they are remote."""
        part = self._part(number)
        if isinstance(part, Path):
            return part
        copy = folder / f"{number:06d}.parquet"
        download(part, copy)
        return copy


def write_file(location: Location, write: Callable[[Path], object]) -> None:
    """Write a file, local or remote, with a function that writes a local one; there is never an incomplete file."""
    if isinstance(location, Path):
        write_atomically(location, write)
        return
    with _local(location) as path:
        write(path)
        upload(path, location)


@contextmanager
def _local(location: Location) -> Iterator[Path]:
    """Yield a local path for a file: its own, or for a remote one that of a temporary copy."""
    if isinstance(location, Path):
        yield location
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / location.rpartition("/")[2]


def encode_shards(
    shards: EncodedShards, numbers: Sequence[int], engine: Engine, progress: Callable[[int], Any]
) -> None:
    """Encode and write those of the shards that are not finished.

    Args:
        shards: where they are written.
        numbers: numbers of the shards, ascending.
        engine: encodes their samples.
        progress: called with a number of samples that were encoded or were so already.
    """
    missing = shards.missing(numbers)
    for number in set(numbers) - set(missing):
        progress(len(shards.index_of(number)))
    for group in shards.by_source(missing):
        batches = engine(np.concatenate([shards.index_of(number) for number in group]))
        for number in group:
            content: list[EncodedSample | BadSample] = []
            for _ in range(math.ceil(len(shards.index_of(number)) / shards.batch_size)):
                content += (batch := next(batches))
                progress(len(batch))
            shards.write(number, content)


def write_empty(folder: Location, encoder: Encoder) -> None:
    """Write the text states of the empty caption to the folder of an encoded set."""
    data = encoder.empty()
    write_file(joined(folder, EMPTY), lambda path: path.write_bytes(data))
