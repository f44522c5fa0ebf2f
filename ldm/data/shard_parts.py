"""Shards of a set, opened folder by folder: by their index, or else by the headers of the tar files."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.data.bad_samples import BadSample
from ldm.data.sample_table import SampleTable, concatenate
from ldm.data.shard_format import ShardContent, scan_shard
from ldm.data.shard_index import IndexedShard, ShardIndex, Table
from ldm.data.shard_set import check_shards
from ldm.data.sources import index_of
from ldm.data.storage import Location, folder_of, name_of, shown
from ldm.errors import DataError


@dataclass(frozen=True)
class Part:
    """Shards of one folder that follow one another: by index, or scanned.

    Attributes:
        samples: number of samples.
        modified: time at which each shard was modified, in nanoseconds; None for remote ones.
        dropped: the samples that the shards have no complete content of.
        index: the index.
        numbers: numbers of the shards in the index.
    """

    samples: int
    modified: list[int | None]
    dropped: list[BadSample]
    index: ShardIndex | None = None
    numbers: Sequence[int] = ()

    @property
    def listed(self) -> list[IndexedShard | None]:
        """Entry of each shard in the index."""
        if self.index is None:
            return [None] * len(self.modified)
        return [self.index.shards[number] for number in self.numbers]

    @property
    def complete(self) -> bool:
        """True if these are all shards of the index, in its order."""
        return self.index is not None and list(self.numbers) == list(range(len(self.index.shards)))

    @property
    def unique(self) -> bool:
        """True if all keys are known to differ."""
        return self.index is not None and self.index.unique

    @property
    def fingerprint(self) -> str:
        """Fingerprint by the index alone."""
        assert self.index is not None
        if self.complete:
            return self.index.fingerprint
        return combined([self.index.shards[i].checksum for i in self.numbers])

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the index."""
        return [] if self.index is None else self.index.columns

    def column(self, name: str) -> Any:
        """Return an Arrow array with the value of a column for each sample; nulls if the index has no such column."""
        import pyarrow as pa

        if self.index is None or name not in self.columns:
            return pa.nulls(self.samples)
        values = self.index.column(name)
        return values if self.complete else values.take(self.index_rows())

    def evaluate(
        self, names: Sequence[str], work: Callable[[Table], np.ndarray], optional: Collection[str] = ()
    ) -> np.ndarray:
        """Return the values that ``work`` computes for the samples from columns of the index; see :meth:`Shards.evaluate`.

        Raises:
            DataError: the index lacks one of the columns that are not optional.
        """
        import pyarrow as pa

        index, missing = self.index, [name for name in names if name not in self.columns]
        assert index is not None
        for name in missing:
            if name not in optional:
                raise DataError(index.missing_column(name))

        def with_missing(table: Table) -> np.ndarray:
            for name in missing:
                table = table.append_column(name, pa.nulls(len(table)))
            return work(table)

        values = np.concatenate(index.map_rows([name for name in names if name not in missing], with_missing))
        return values if self.complete else values[self.index_rows()]

    def index_rows(self) -> np.ndarray:
        """Return the rows of the index that are those of the part."""
        assert self.index is not None
        starts = np.cumsum((0, *(shard.samples for shard in self.index.shards)))
        return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in self.numbers])


def open_parts(
    paths: Sequence[Location], indices: Mapping[Location, ShardIndex], sidecar: bool = True
) -> Iterator[tuple[SampleTable, Part]]:
    """Yield the samples of consecutive shards of one folder, and how they were found.

    Args:
        paths: the shards, each once.
        indices: indices by folder, that do not have to be found.
        sidecar: whether the samples' JSON files are needed.

    Raises:
        DataError: a shard that is missing, not a tar file, or not the one of its index or report; a remote shard
            without an index.
    """
    for folder, group in itertools.groupby(paths, folder_of):
        in_folder = list(group)
        index = indices.get(folder) or index_of(folder)
        yield _scanned(in_folder) if index is None else _indexed(in_folder, index, sidecar)


def _scanned(paths: Sequence[Location]) -> tuple[SampleTable, Part]:
    contents = {path: _content(path, _state(path)) for path in paths if isinstance(path, Path)}
    check_shards({path: content.checksum for path, content in contents.items()})
    dropped = [bad for content in contents.values() for bad in content.dropped]
    table = concatenate([content.table for content in contents.values()])
    return table, Part(len(table), [content.modified for content in contents.values()], dropped)


@lru_cache(maxsize=16)
def _content(path: Path, state: object) -> ShardContent:
    """Return the content of a shard in this state, of which the last ones are kept for data sets that are opened repeatedly."""
    return scan_shard(path)


def _state(path: Path) -> object:
    """Return what changes when the file is written; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _indexed(paths: Sequence[Location], index: ShardIndex, sidecar: bool) -> tuple[SampleTable, Part]:
    by_name = {shard.name: number for number, shard in enumerate(index.shards)}
    missing = [path for path in paths if name_of(path) not in by_name]
    if missing:
        raise DataError(
            f"the index {shown(index.location)} does not list the shard {shown(missing[0])}; {index.remedy}."
        )
    numbers = [by_name[name_of(path)] for path in paths]
    local = {path: number for path, number in zip(paths, numbers, strict=True) if isinstance(path, Path)}
    check_shards({path: index.shards[number].contained for path, number in local.items()})
    index.check(numbers)
    modified = [path.stat().st_mtime_ns if isinstance(path, Path) else None for path in paths]
    dropped = [bad for number in numbers for bad in index.shards[number].dropped]
    part = Part(sum(index.shards[number].samples for number in numbers), modified, dropped, index, numbers)
    table = index.table(sidecar=sidecar)
    return table if part.complete else table.take_shards(numbers), part


def combined(texts: Sequence[str]) -> str:
    """Return a single text as it is, and a hash of several."""
    return texts[0] if len(texts) == 1 else hashlib.blake2b("/".join(texts).encode(), digest_size=16).hexdigest()


def check_distinct(paths: Sequence[Location]) -> None:
    """Raise a DataError if a file is listed twice."""
    resolved = Counter(path.resolve() if isinstance(path, Path) else path for path in paths)
    for path, times in resolved.items():
        if times > 1:
            raise DataError(f"the file {shown(path)} occurs twice among the sources of the data; list each file once.")


def names_of(paths: Sequence[Location]) -> list[str]:
    """Return names that tell shards apart: their paths relative to the folder that contains them all, without suffix."""
    parts = [str(path.resolve() if isinstance(path, Path) else path).split("/") for path in paths]
    levels = zip(*(part[:-1] for part in parts), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    return [PurePosixPath(*part[common:]).with_suffix("").as_posix() for part in parts]
