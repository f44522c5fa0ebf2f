"""Samples of shards by number.

An index of the shards, or one pass over the headers of local ones, gives access to every sample by number. Order, resume, ranks
and workers are then arithmetic on sample numbers (see :mod:`ldm.data.stream`), wherever the shards lie.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.data.bad_samples import Reason, dropped, warn_of
from ldm.data.measures import field_member
from ldm.data.remote_shards import RemoteShards
from ldm.data.sample_table import Names, concatenate, repeated
from ldm.data.shard_cache import ShardCache
from ldm.data.shard_format import (
    FIRST,
    IMAGE,
    IMAGE_SUFFIXES,
    MEMBERS,
    SIDECAR,
    SPLITS,
    Sample,
    checksum_of,
    write_shard,
)
from ldm.data.shard_index import ShardIndex, Table, joined_tables
from ldm.data.shard_parts import check_distinct, combined, names_of, open_parts
from ldm.data.sources import EMOJI, find, find_shards
from ldm.data.storage import Location, folder_of, shown
from ldm.errors import DataError, StorageError, unknown
from ldm.modalities import Modality
from ldm.modalities.caption import CAPTION
from ldm.modalities.label import LABEL

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "EMOJI",
    "IMAGE_SUFFIXES",
    "MEMBERS",
    "SPLITS",
    "Sample",
    "Shards",
    "checksum_of",
    "find_shards",
    "write_shard",
]

_TAIL = 256  # bytes of a member that its fingerprint covers
_HASHED = 100_000  # samples of a set whose bytes its fingerprint covers
_BATCH = 1 << 16  # samples that are handled at a time


class Shards:
    """Samples of several shards by number, read when needed.

    A sample without an image, or without both caption and class number, is skipped, and so is one without a caption if others
    have one, the incomplete one at the end of a truncated shard, and the later ones of the same key in a shard; a warning gives
    their number. If a key occurs in several shards, all keys are preceded by the name of their shard.

    Args:
        paths: the shards, as :func:`find_shards` lists them. Those of a folder with an index are read by the index.
        indices: indices of the shards, by folder, that do not have to be read again or lie elsewhere.
        caption_field: field of the samples' JSON files that holds the caption, instead of ``.txt``.
        label_field: field of the samples' JSON files that holds the class number, instead of ``.cls``.
        cache: cache of remote shards, which are then copied completely. None: each sample is read by a request of its own.
        content: column of the member that each sample must have: the image, or for encoded samples its latents.

    Attributes:
        paths: the shards.
        keys: the key of each sample.
        lengths: the number of samples of each shard.
        modalities: those that the samples have, by key.
        dropped: the samples that are skipped.
        remote: those of the shards that are remote.

    Raises:
        DataError: a shard that is missing, not a tar file, not the one of its index, or listed twice; a remote shard
            without an index; a set without complete samples; a modality, other than captions, that some samples have and
            some lack.
    """

    def __init__(
        self,
        paths: Sequence[Location],
        *,
        indices: Mapping[Location, ShardIndex] | None = None,
        caption_field: str | None = None,
        label_field: str | None = None,
        cache: ShardCache | None = None,
        content: str = IMAGE,
    ):
        self.paths = list(paths)
        assert self.paths, "no shards are given"
        check_distinct(self.paths)
        self._fields = {CAPTION.key: caption_field, LABEL.key: label_field}
        tables, self._parts = zip(
            *open_parts(self.paths, indices or {}, sidecar=any(self._fields.values())), strict=True
        )
        self._modified = [modified for part in self._parts for modified in part.modified]
        self._table = concatenate(tables)
        self.remote = RemoteShards(self.paths, [shard for part in self._parts for shard in part.listed], cache)
        self._starts = np.cumsum((0, *self._table.lengths))
        self._rows: np.ndarray | None = None
        self._prefixes: list[str] | None = None
        self._chosen = ""
        self.dropped = [bad for part in self._parts for bad in part.dropped]
        warn_of(self.dropped)
        if not len(self._table):
            raise DataError(
                f"there is no sample in {', '.join(map(shown, self.paths))}; make shards with tools/prepare.py."
            )
        self._count()
        lack = f"no image ({', '.join(IMAGE_SUFFIXES)})" if content == IMAGE else f"no .{content}"
        self._drop(self._table.has(content), lack, Reason.NO_IMAGE)
        describing = {suffix: modality for suffix, modality in MEMBERS.items() if modality.describes}
        nouns = " nor ".join(f"{modality.noun} ({self._file(modality)})" for modality in describing.values())
        described = np.any([self._has(modality) for modality in describing.values()], axis=0)
        self._drop(described, f"neither {nouns}", Reason.NO_CAPTION)
        self.modalities = {modality.key: modality for modality in MEMBERS.values() if self._in_all(modality)}
        if CAPTION.key in self.modalities:
            self._drop(self._has(CAPTION), f"no {CAPTION.noun} ({self._file(CAPTION)})", Reason.NO_CAPTION)
        if not (len(self._parts) == 1 and self._parts[0].unique) and repeated(self.keys):
            self._prefixes = names_of(self.paths)
            self._count()

    @classmethod
    def open(
        cls,
        source: str | Sequence[str],
        split: str,
        *,
        caption_field: str | None = None,
        label_field: str | None = None,
        cache: ShardCache | None = None,
        sequential: bool = False,
        content: str = IMAGE,
    ) -> Shards:
        """Open the shards that a source names; see :func:`find_shards` and the class.

        The cache is used if shards are read in sequence (``sequential``) or all remote ones fit into it: in another order, a
        shard would be copied for a few of its samples and deleted before the next.
        """
        found = find(source, split)
        shards = cls(
            found.paths,
            indices=found.indices,
            caption_field=caption_field,
            label_field=label_field,
            cache=cache,
            content=content,
        )
        if cache is not None and not sequential and shards.remote.total_bytes > cache.size:
            shards.remote.cache = None
        return shards

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def unique(self) -> bool:
        """True if the keys differ without the names of the shards."""
        return self._prefixes is None

    def keep(self, index: np.ndarray) -> Shards:
        """Return the set of only some samples, with a fingerprint of its own.

        Args:
            index: their numbers, in ascending order; used without a copy if they are uint32.
        """
        assert np.all(index[1:] > index[:-1]), "the samples to keep are in another order"
        kept = copy.copy(self)
        kept.__dict__.pop("fingerprint", None)
        kept._chosen += hashlib.blake2b(np.ascontiguousarray(index, np.uint32).data, digest_size=16).hexdigest()
        kept._rows = self._row(np.asarray(index)).astype(np.uint32, copy=False)
        kept._count()
        return kept

    @property
    def columns(self) -> list[str]:
        """Names of the columns that :meth:`column` returns."""
        return list(dict.fromkeys(name for part in self._parts for name in part.columns))

    @property
    def indices(self) -> list[ShardIndex]:
        """Indices of those shards that have one."""
        return [part.index for part in self._parts if part.index is not None]

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the index, with a value for each sample; null where it is not known.

        Args:
            name: such as ``width``, ``height`` (pixels), ``caption_length`` (characters) or a field of the samples' JSON
                files; see :mod:`ldm.data.shard_index`.

        Raises:
            DataError: there is no such column.
        """
        import pyarrow as pa

        if name not in self.columns:
            if not self.columns:
                raise DataError(
                    f"the shards in {shown(folder_of(self.paths[0]))} have no index with a column {name!r}; make one with "
                    "tools/prepare.py index."
                )
            raise DataError(unknown("column of the index", name, self.columns))
        tables = [pa.table({name: part.column(name)}) for part in self._parts]
        column = joined_tables(tables).column(name)
        return column if self._rows is None else column.take(self._rows)

    def evaluate(
        self,
        names: Sequence[str],
        work: Callable[[Table], np.ndarray],
        unindexed: Callable[[range], np.ndarray],
        optional: Collection[str] = (),
    ) -> np.ndarray:
        """Return a value for each sample, computed from columns of the index, of which only some rows are in memory at a time.

        Args:
            names: the columns.
            work: function from a ``pyarrow.Table`` of them to the values of its samples.
            unindexed: function from numbers of samples that have no index to their values.
            optional: columns that an index may lack if that of another source has them; they are then null.

        Raises:
            DataError: an index lacks a column.
        """
        values, start, optional = [], 0, {*optional} & {*self.columns}
        for part in self._parts:
            end = start + part.samples
            bounds = np.array((start, end), np.uint32)  # of the type of the rows, which would be copied otherwise
            first, last = (start, end) if self._rows is None else np.searchsorted(self._rows, bounds).tolist()
            if part.index is None:
                values.append(unindexed(range(first, last)))
            else:
                found = part.evaluate(names, work, optional)
                values.append(found if self._rows is None else found[self._rows[first:last] - start])
            start = end
        return np.concatenate(values)

    def prepare(self, index: np.ndarray, ahead: Sequence[int] = ()) -> None:
        """Read what a batch needs of remote shards at once, or copy the shards that are read next in the background.

        Args:
            index: numbers of the samples of the batch.
            ahead: numbers of the shards that are read now and next, if they are read in sequence.
        """
        if self.remote.copied:
            self.remote.read_ahead(ahead)
        elif self.remote.shards:
            rows = [(int(self._row(i)), self._shard(i)) for i in index.tolist()]
            columns = self._table.members
            self.remote.prepare(
                [(row, shard, [self._table.span(each, row) for each in columns]) for row, shard in rows]
            )

    def image(self, i: int) -> bytes:
        """Return the encoded image of sample ``i``."""
        return self._read(i, IMAGE)

    def member(self, i: int, column: str) -> bytes:
        """Return the member of sample ``i`` in a column, as stored; empty if it has none."""
        return self._read(i, column)

    def text(self, i: int) -> str:
        """Return the caption of sample ``i``; empty if it has none."""
        caption: str = self.value(i, CAPTION)
        return caption

    def encoded(self, i: int, modality: Modality) -> bytes:
        """Return the member of sample ``i`` with its value of a modality, as stored; empty if it has none."""
        assert modality.suffix is not None, f"{modality.noun} is not stored"
        field = self._fields.get(modality.key)
        if field is None:
            return self._read(i, modality.suffix)
        return field_member(self._read(i, SIDECAR), modality, field)

    def value(self, i: int, modality: Modality) -> Any:
        """Return the decoded value of a modality for sample ``i``.

        Raises:
            DataError: the member is malformed.
        """
        try:
            return modality.decode(self.encoded(i, modality))
        except StorageError:
            raise
        except DataError as error:
            raise DataError(f"the {modality.noun} of {self.where(i)} {error}; write the shard again.") from None

    def where(self, i: int) -> str:
        """Return the shard and key of sample ``i``, for messages."""
        return f"{self.keys[i]!r} in {self.path(i)}"

    def path(self, i: int) -> str:
        """Return the path or URL of the shard of sample ``i``."""
        return shown(self.paths[self._shard(i)])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Text that depends on the samples and their order, not on the place of the shards.

        That of a complete set with an index is in the index; that of a part of it follows from the checksums of the shards.
        """
        indexed = [part.fingerprint for part in self._parts if part.index is not None]
        if len(indexed) == len(self._parts):
            text = combined(indexed)
        else:
            text = combined([self.content_fingerprint(), *(indexed if self.remote.shards else ())])
        fields = "".join(f"{key}:{field}" for key, field in self._fields.items() if field is not None)
        return combined([text, *filter(None, (self._chosen, fields))])

    def content_fingerprint(self) -> str:
        """Return a hash of the keys, and of the offsets and, in local shards, last bytes of members, which are read."""
        digest = hashlib.blake2b(digest_size=16)
        # Local shards have always been hashed with the names that tell them apart; those of remote ones depend on their place.
        keys = Names(self._table.keys, self._rows, None, self._starts) if self.remote.shards else self.keys
        for start in range(0, len(self), _BATCH):
            names = "\n".join(keys[start : start + _BATCH])
            digest.update(("\n" * (start > 0) + names).encode(errors="surrogateescape"))
        digest.update(self._tails())
        columns = (IMAGE, *FIRST)
        for start in range(0, len(self), _BATCH):
            rows = self._row(slice(start, start + _BATCH))
            digest.update(np.stack([self._table.spans(column, rows) for column in columns], axis=1).tobytes())
        for suffix, modality in list(MEMBERS.items())[len(FIRST) :]:
            if modality.key in self.modalities:
                digest.update(suffix.encode())
                for start in range(0, len(self), _BATCH):
                    digest.update(self._table.spans(suffix, self._row(slice(start, start + _BATCH))).tobytes())
        return digest.hexdigest()

    def _tails(self) -> bytes:
        """Return a hash of the last ``_TAIL`` bytes of the members of up to ``_HASHED`` samples of local shards.

        All of a short caption, and of an image its checksum (PNG) or the end of its entropy code, which any change alters.
        """
        digest, first = hashlib.blake2b(digest_size=16), 0
        every = -(-len(self) // _HASHED)
        columns = [column for column in (IMAGE, *MEMBERS) if column in self._table.members]
        for path, length in zip(self.paths, self.lengths, strict=True):
            rows = self._row(np.arange(first, first + length, every))
            first += length
            if not isinstance(path, Path):
                continue
            spans = np.stack([self._table.spans(column, rows) for column in columns], axis=1)
            with path.open("rb") as file:
                for offset, size in spans.reshape(-1, 2).tolist():
                    if size > 0:
                        file.seek(offset + max(0, size - _TAIL))
                        digest.update(file.read(min(size, _TAIL)))
        return digest.digest()

    def _row(self, i: Any) -> Any:
        """Return the rows of the table for sample numbers, an array or a slice."""
        return i if self._rows is None else self._rows[i]

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self._starts, self._row(i), "right")) - 1

    def _count(self) -> None:
        """Set what follows from the rows that are kept."""
        rows = self._rows
        bounds = self._starts if rows is None else np.searchsorted(rows, self._starts.astype(rows.dtype))
        self.lengths: list[int] = np.diff(bounds).tolist()
        self.keys: Sequence[str] = Names(self._table.keys, rows, self._prefixes, self._starts)

    def _has(self, modality: Modality) -> np.ndarray:
        """Return bool for each row of the table: whether it has a modality."""
        assert modality.suffix is not None
        return self._table.has(modality.suffix if self._fields.get(modality.key) is None else SIDECAR)

    def _file(self, modality: Modality) -> str:
        field = self._fields.get(modality.key)
        return f".{modality.suffix}" if field is None else f".{SIDECAR} with {field!r}"

    def _drop(self, complete: np.ndarray, lack: str, reason: Reason) -> None:
        """Keep the samples whose rows are complete, and warn of the others.

        Raises:
            DataError: none is.
        """
        complete = complete if self._rows is None else complete[self._rows]
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
        self._rows = self._row(np.flatnonzero(complete)).astype(np.uint32)
        self._count()

    def _in_all(self, modality: Modality) -> bool:
        """Return True if the samples have a modality.

        Raises:
            DataError: only some of them have one that is required for all.
        """
        has = self._has(modality) if self._rows is None else self._has(modality)[self._rows]
        if has.any() and not has.all() and not modality.optional:
            having, lacking = (self.where(int(each)) for each in (np.argmax(has), np.argmin(has)))
            raise DataError(f"the sample {having} has {modality.file}, but {lacking} has none; all samples need one.")
        return bool(has.any())

    def _read(self, i: int, column: str) -> bytes:
        row, shard = int(self._row(i)), self._shard(i)
        offset, size = self._table.span(column, row)
        if size < 0:
            return b""
        path = self.paths[shard]
        if not isinstance(path, Path):
            return self.remote.read(row, shard, offset, size)
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
        if modified != self._modified[shard]:
            raise StorageError(f"the shard {path} was replaced since it was opened; run the same command again.")
        return data
