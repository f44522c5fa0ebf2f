"""Samples of shards as columns: keys, and where the members of each sample lie.

Ten million samples are a few arrays of numbers and one of bytes, which worker processes share, instead of millions of Python
objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

SIDECAR = "json"
"""Suffix of the member with further fields of a sample."""

Spans = tuple[np.ndarray, np.ndarray]
"""Offsets (int64 or uint32 ``[n]``) and sizes (int32 ``[n]``) of the members of a kind, in bytes; size -1 where there is none."""


class Strings(Sequence[str]):
    """Sequence of texts that are made when they are taken; a subclass gives each by its number, in ``_text``."""

    def _text(self, i: int) -> str:
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        places = range(len(self))[i]
        return self._text(places) if isinstance(places, int) else [self._text(place) for place in places]


class Keys(Strings):
    """Names of samples in one array of bytes.

    Args:
        data: uint8, the names in UTF-8 one after another; bytes that are not UTF-8 are read as surrogates.
        ends: ``[n + 1]``, 0 and the end of each name in ``data``; ``range(0, len(data) + 1, m)`` if all have m bytes.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray | range):
        self.data, self._ends = data, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> Keys:
        """Return names as an array."""
        encoded = [name.encode(errors="surrogateescape") for name in names]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends_of([len(name) for name in encoded]))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _text(self, i: int) -> str:
        return bytes(self.data[self._ends[i] : self._ends[i + 1]]).decode(errors="surrogateescape")

    def lengths(self) -> np.ndarray:
        """Return the number of bytes of each name."""
        return np.diff(np.asarray(self._ends))

    def take(self, rows: np.ndarray) -> Keys:
        """Return the names of some rows."""
        lengths = self.lengths()[rows]
        ends = ends_of(lengths)
        places = np.repeat(np.asarray(self._ends)[:-1][rows].astype(np.int64) - ends[:-1], lengths) + np.arange(
            ends[-1]
        )
        return Keys(self.data[places], ends)


class Names(Strings):
    """Names of the samples that are kept, preceded by those of their shards if needed."""

    def __init__(self, keys: Keys, rows: np.ndarray | None, prefixes: list[str] | None, starts: np.ndarray):
        self._keys, self._rows, self._prefixes, self._starts = keys, rows, prefixes, starts

    def __len__(self) -> int:
        return len(self._keys) if self._rows is None else len(self._rows)

    def _text(self, i: int) -> str:
        row = i if self._rows is None else int(self._rows[i])
        if self._prefixes is None:
            return self._keys[row]
        return f"{self._prefixes[int(np.searchsorted(self._starts, row, 'right')) - 1]}/{self._keys[row]}"


def ends_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return 0 and the sums of the first 1, 2, ... lengths, in the smallest suitable type."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends.astype(np.uint32) if ends[-1] < 2**32 else ends


@dataclass(frozen=True)
class SampleTable:
    """Samples of some shards, in the order of the shards.

    Attributes:
        keys: name of each sample.
        lengths: number of samples of each shard.
        members: places of the members by column, of those columns that any sample has.
    """

    keys: Keys
    lengths: list[int]
    members: Mapping[str, Spans]

    @classmethod
    def of(cls, keys: Sequence[str], lengths: list[int], members: Mapping[str, Spans]) -> SampleTable:
        """Return a table of keys given as strings."""
        return cls(Keys.of(keys), lengths, members)

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, column: str) -> np.ndarray:
        """Return ``[n]`` of bool: whether each sample has this member."""
        if column not in self.members:
            return np.zeros(len(self), bool)
        has: np.ndarray = self.members[column][1] >= 0
        return has

    def spans(self, column: str, rows: np.ndarray | slice) -> np.ndarray:
        """Return int64 ``[r 2]``: offset and size of the member of some rows, (0, -1) where there is none."""
        if column not in self.members:
            count = len(range(len(self))[rows]) if isinstance(rows, slice) else len(rows)
            return np.tile(np.array([0, -1]), (count, 1))
        offsets, sizes = self.members[column]
        return np.stack([offsets[rows].astype(np.int64), sizes[rows].astype(np.int64)], axis=1)

    def span(self, column: str, row: int) -> tuple[int, int]:
        """Return offset and size of the member of a row; the size is -1 if there is none."""
        if column not in self.members:
            return 0, -1
        offsets, sizes = self.members[column]
        return int(offsets[row]), int(sizes[row])

    def take_shards(self, numbers: Sequence[int]) -> SampleTable:
        """Return the samples of some shards, in the order of ``numbers``."""
        starts = np.cumsum((0, *self.lengths))
        rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in numbers])
        members = {column: (offsets[rows], sizes[rows]) for column, (offsets, sizes) in self.members.items()}
        return SampleTable(self.keys.take(rows), [self.lengths[s] for s in numbers], members)


def concatenate(tables: Sequence[SampleTable]) -> SampleTable:
    """Return one table of the samples of several; a single one is not copied."""
    if len(tables) == 1:
        return tables[0]
    keys = Keys(
        np.concatenate([table.keys.data for table in tables]),
        ends_of(np.concatenate([table.keys.lengths() for table in tables])),
    )
    columns = dict.fromkeys(column for table in tables for column in table.members)
    members = {column: _concatenated(tables, column) for column in columns}
    return SampleTable(keys, [length for table in tables for length in table.lengths], members)


def _concatenated(tables: Sequence[SampleTable], column: str) -> Spans:
    parts = [
        table.members.get(column, (np.zeros(len(table), np.int64), np.full(len(table), -1, np.int32)))
        for table in tables
    ]
    return np.concatenate([offsets for offsets, _ in parts]), np.concatenate([sizes for _, sizes in parts])


def repeated(keys: Sequence[str], batch: int = 1 << 16) -> bool:
    """Return True if a name occurs twice; this needs 16 bytes per name and no second copy of them."""

    def batches() -> Iterator[Any]:
        for start in range(0, len(keys), batch):
            yield from map(hash, keys[start : start + batch])

    hashes = np.fromiter(batches(), np.int64, len(keys))
    order = np.sort(hashes)
    twice = np.unique(order[1:][order[1:] == order[:-1]])
    if not len(twice):
        return False
    candidates = [keys[int(i)] for i in np.flatnonzero(np.isin(hashes, twice))]
    return len(set(candidates)) < len(candidates)
