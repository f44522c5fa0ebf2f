"""Index of a set of shards: one parquet file, ``index.parquet``, in the folder of the shards.

It has a row for each sample and is read column by column, so that a training starts without reading the headers of the shards:

- ``key``;
- ``image.offset`` and ``image.size`` in bytes, and the same of each other kind of member that a sample has, such as
  ``txt.offset`` (size -1 where a sample lacks one);
- ``width`` and ``height`` in pixels, ``caption_length`` in characters, and the fields of the samples' JSON files, null where
  they are not known. They are for the choice of samples, and are read when they are needed.

The metadata ``ldm`` of its schema, in JSON, lists the shards in order, each with its number of samples and what shows whether
it is still the same file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ldm.data.bad_samples import BadSample, Reason
from ldm.data.sample_table import SIDECAR, Keys, SampleTable, ends_of
from ldm.data.storage import Location, attempted, folder_of, joined, located, shown
from ldm.errors import DataError, first_line, some, warn

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
_METADATA = b"ldm"
_ROWS_AT_ONCE = 1 << 18  # rows that are decoded at a time
_TAIL = 16 << 10  # bytes; includes the checksum at the end of the shards that ldm writes

Table = Any
"""``pyarrow.Table``."""

T = TypeVar("T")


@dataclass(frozen=True)
class IndexedShard:
    """A shard as an index lists it.

    Attributes:
        name: name of the file in its folder.
        samples: number of rows of the index.
        bytes: size of the file.
        checksum: BLAKE2b hash of the file; see :func:`ldm.data.storage.checksum`.
        tail: hash of its last 16 KiB, a check that needs one short read.
        contained: checksum that the shard contains; None if it has none.
        dropped: the samples that it has no complete content of.
    """

    name: str
    samples: int
    bytes: int
    checksum: str
    tail: str
    contained: str | None
    dropped: tuple[BadSample, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IndexedShard:
        """Return the shard that :func:`dataclasses.asdict` made ``values`` of."""
        bad = (BadSample(**{**each, "reason": Reason(each["reason"])}) for each in values["dropped"])
        return cls(**{**values, "dropped": tuple(bad)})


class ShardIndex:
    """An index that was written by :func:`write_index`; only its metadata are read at once.

    Args:
        location: the file.

    Attributes:
        location: the file.
        folder: folder of the shards.
        shards: the shards, in the order of their samples.
        fingerprint: fingerprint of the complete set.
        unique: whether all keys differ.
        encoding: what encoded samples depend on, by name; None for images.
        captions: ``field`` and ``format`` by which captions were measured; None in an index of an earlier version.
        columns: names of the columns for :meth:`column`.

    Raises:
        DataError: the file is missing or is no index, or was written by a later version.
    """

    def __init__(self, location: Location):
        self.location = location
        schema = self._open(lambda file: file.schema_arrow)
        try:
            content = json.loads(schema.metadata[_METADATA])
            version = content["version"]
        except (TypeError, KeyError, ValueError):
            raise DataError(f"{shown(location)} is not an index of shards; {self._again}.") from None
        if version != VERSION:
            raise DataError(f"the index {shown(location)} has the format {version}, not {VERSION}; {self._again}.")
        folder = content["folder"]
        self.folder = folder_of(location) if folder is None else located(folder)
        self.shards = [IndexedShard.from_dict(shard) for shard in content["shards"]]
        self._key_bytes = int(content["key_bytes"])
        self.fingerprint, self.unique = str(content["fingerprint"]), bool(content["unique"])
        self.encoding: dict[str, Any] | None = content.get("encoding")
        self.captions: dict[str, str | None] | None = content.get("captions")
        self._members = list(
            dict.fromkeys(name[: -len(".offset")] for name in schema.names if name.endswith(".offset"))
        )
        used = {"key", *(f"{member}.{part}" for member in self._members for part in ("offset", "size"))}
        self.columns = [name for name in schema.names if name not in used]

    @property
    def paths(self) -> list[Location]:
        """Locations of the shards."""
        return [joined(self.folder, shard.name) for shard in self.shards]

    def table(self, *, sidecar: bool = True) -> SampleTable:
        """Read keys and places of the members of all samples; of their JSON files only if ``sidecar`` is true."""
        n = sum(shard.samples for shard in self.shards)
        keys = self._keys(n)  # first, since it needs more memory for a moment
        small = max((shard.bytes for shard in self.shards), default=0) < 2**32
        kinds = {"offset": np.uint32 if small else np.int64, "size": np.int32}
        members: dict[str, Any] = {
            member: tuple(self._numbers(f"{member}.{part}", n, kind) for part, kind in kinds.items())
            for member in self._members
            if sidecar or member != SIDECAR
        }
        return SampleTable(keys, [shard.samples for shard in self.shards], members)

    def _numbers(self, name: str, n: int, kind: type[np.generic]) -> np.ndarray:
        numbers = np.empty(n, kind)

        def load(file: Any) -> None:
            start = 0
            for group in range(file.num_row_groups):  # one after another, so that nothing is in memory twice
                part = file.read_row_group(group, [name]).column(0).to_numpy()
                numbers[start : start + len(part)] = part
                start += len(part)

        self._open(load)
        return numbers

    def _keys(self, n: int) -> Keys:
        data = np.empty(self._key_bytes, np.uint8)
        lengths = np.empty(n, np.int32)

        def load(file: Any) -> None:
            start, place = 0, 0
            for group in range(file.num_row_groups):
                names, lengths_here = _names(file.read_row_group(group, ["key"]).column(0))
                data[place : place + len(names)] = names
                lengths[start : start + len(lengths_here)] = lengths_here
                start, place = start + len(lengths_here), place + len(names)

        self._open(load)
        width = int(lengths.max(initial=0))
        if width and width == lengths.min(initial=width):  # as numbers with leading zeros, which need no array of ends
            return Keys(data, range(0, width * n + 1, width))
        return Keys(data, ends_of(lengths))

    def column(self, name: str) -> pa.ChunkedArray:
        """Read a further column, of all samples."""
        return self._open(lambda file: file.read([name])).column(0)

    def map_rows(self, names: Sequence[str], work: Callable[[Table], T]) -> list[T]:
        """Return ``work(table)`` for tables of some columns of consecutive samples, of which only one is in memory at a time."""
        return self._open(lambda file: [work(file.read_row_group(i, list(names))) for i in range(file.num_row_groups)])

    def check(self, numbers: Sequence[int]) -> None:
        """Raise a DataError if one of these shards, on a local disk, is not the file that was indexed.

        Remote shards are checked when they are read: their size, and their checksum when a complete one is copied.
        """
        for number in numbers:
            shard, path = self.shards[number], joined(self.folder, self.shards[number].name)
            if not isinstance(path, Path):
                continue
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise DataError(
                    f"the shard {path}, which {self._named} lists, does not exist; {self.remedy}."
                ) from None
            if size != shard.bytes or tail_of(path) != shard.tail:
                raise DataError(f"the shard {path} is not the one that {self._named} lists; {self.remedy}.")

    def check_names(self, names: Sequence[str]) -> None:
        """Raise a DataError if the shards of the folder are not those of the index."""
        differing = {*names} ^ {shard.name for shard in self.shards}
        if differing:
            raise DataError(
                f"the shards in {shown(self.folder)} are not those that {self._named} lists ({some(sorted(differing))}); "
                f"{self.remedy}."
            )

    def check_captions(self, field: str | None, form: str) -> None:
        """Check that the length and language of captions are those of the captions that a training reads.

        Args:
            field: ``data.caption_field``.
            form: ``data.captions.format``.

        Raises:
            DataError: other captions were measured. For an index that does not say which, there is a warning.
        """
        if self.captions == {"field": field, "format": form}:
            return
        options = (f" --caption-field {field}" if field else "") + (
            f" --caption-format {form}" if form != "text" else ""
        )
        again = f"make it again with tools/prepare.py index {shown(self.folder)}{options}"
        if self.captions is None:
            warn(
                f"{self._named} was made by an earlier version and does not say which captions it measured; if it was not made "
                f"with the same caption field and format, {again}."
            )
            return
        used, measured = (
            f"{'.txt' if source is None else f'the field {source!r}'} as {kind}"
            for source, kind in ((field, form), (self.captions["field"], self.captions["format"]))
        )
        raise DataError(
            f"{self._named} has the length and language of the captions in {measured}, but data.caption_field and "
            f"data.captions.format read {used}; {again}."
        )

    def missing_column(self, name: str) -> str:
        """Return the sentence for a column that the index does not have."""
        folder = shown(self.folder)
        if name == "language":
            return (
                f"{self._named} has no column 'language'; add it with tools/prepare.py index {folder} --language all."
            )
        near = difflib.get_close_matches(name, self.columns, n=1)
        guess = f"did you mean {near[0]!r}? If not, " if near else ""
        return (
            f"{self._named} has no column {name!r}, only {', '.join(self.columns)}; {guess}make it again with tools/prepare.py "
            f"index {folder} --fields {name}, if the .json files of the samples have this field."
        )

    @property
    def _named(self) -> str:
        return f"the index {shown(self.location)}"

    @property
    def remedy(self) -> str:
        """Advice for shards that have changed."""
        return f"make the index again with tools/prepare.py index {shown(self.folder)}"

    def _open(self, load: Callable[[Any], Any]) -> Any:
        """Return the result of ``load`` for the ``pyarrow.parquet.ParquetFile``; over a network it may be called again."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        def read(source: Any) -> Any:
            with pq.ParquetFile(source, pre_buffer=False) as file:
                result = load(file)
            pa.default_memory_pool().release_unused()
            return result

        def remote(fs: Any, path: str) -> Any:
            with fs.open(path, "rb", cache_type="bytes", block_size=1 << 20) as file:
                return read(file)

        try:
            return read(self.location) if isinstance(self.location, Path) else attempted(self.location, remote)
        except FileNotFoundError:
            raise DataError(f"the index {self.location} does not exist; check the sources given under data.") from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"the index {shown(self.location)} cannot be read ({first_line(error)}); {self._again}."
            ) from None

    @property
    def _again(self) -> str:
        return f"make it again with tools/prepare.py index {shown(folder_of(self.location))}"


def _names(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of an Arrow column of names, and the length of each."""
    import pyarrow as pa

    names = column.cast(pa.large_binary()).combine_chunks()
    _, ends, data = names.buffers()
    ends = np.frombuffer(ends, np.int64)[names.offset : names.offset + len(names) + 1]
    return np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]], np.diff(ends)


def tail_of(path: Path) -> str:
    """Return a hash of the last 16 KiB of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def table_of(content: SampleTable, columns: Mapping[str, Sequence[Any] | np.ma.MaskedArray]) -> Table:
    """Return the rows of an index as a ``pyarrow.Table``.

    Args:
        content: keys and places of members.
        columns: further columns by name, each with a value or None for each sample, or masked numbers.
    """
    import pyarrow as pa

    keys = pa.array([key.encode(errors="surrogateescape") for key in content.keys], pa.binary())
    with contextlib.suppress(pa.ArrowInvalid):  # names that are not UTF-8 stay bytes
        keys = keys.cast(pa.string())
    arrays = {"key": keys}
    for member, (offsets, sizes) in content.members.items():
        arrays |= {f"{member}.offset": pa.array(offsets), f"{member}.size": pa.array(sizes)}
    return pa.table(arrays | {name: typed(values) for name, values in columns.items()})


def typed(values: Sequence[Any] | np.ma.MaskedArray) -> Any:
    """Return values as an Arrow array of the type that fits all of them: bool, int64, double, or else string."""
    import pyarrow as pa

    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, mask=values.mask)
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pa.array(values, pa.int64())
    if kinds and kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    texts = (value if isinstance(value, str) or value is None else json.dumps(value) for value in values)
    return pa.array([None if text is None else text.encode(errors="replace").decode() for text in texts], pa.string())


def joined_tables(tables: Sequence[Table]) -> Table:
    """Return the rows of several tables in one.

    A column that some lack is filled with nulls (the places of members with -1); one whose type differs becomes a double if all
    are numbers, else text. The type of a column of which a table has no value does not count.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    types: dict[str, set[Any]] = {}
    empty: dict[str, set[Any]] = {}
    for table in tables:
        for field, column in zip(table.schema, table.columns, strict=True):
            types.setdefault(field.name, set())
            has_values = column.null_count < len(column)
            (types if has_values else empty).setdefault(field.name, set()).add(field.type)
    chosen = {}
    for name, with_values in types.items():
        found = with_values or empty[name]
        numbers = all(pa.types.is_integer(each) or pa.types.is_floating(each) for each in found)
        binary = pa.binary() in found
        chosen[name] = (
            next(iter(found))
            if len(found) == 1
            else pa.binary()
            if binary
            else pa.float64()
            if numbers
            else pa.string()
        )
    unified = []
    for table in tables:
        columns = {}
        for name, kind in chosen.items():
            if name in table.column_names:
                columns[name] = pc.cast(table.column(name), kind)
            elif name.endswith((".offset", ".size")):
                columns[name] = pa.array(np.full(len(table), -1 if name.endswith(".size") else 0), kind)
            else:
                columns[name] = pa.nulls(len(table), kind)
        unified.append(pa.table(columns))
    return pa.concat_tables(unified)


def write_index(
    path: Path,
    table: Table,
    shards: Sequence[IndexedShard],
    *,
    fingerprint: str,
    unique: bool,
    folder: str | None = None,
    encoding: Mapping[str, Any] | None = None,
    captions: Mapping[str, str | None] | None = None,
) -> None:
    """Write an index; equal arguments give equal bytes.

    Args:
        path: the file; not written atomically.
        table: a row for each sample; see :func:`table_of`.
        shards: the shards, in the order of their rows.
        fingerprint: fingerprint of the set.
        unique: whether all keys differ.
        folder: folder of the shards; None: that of the index.
        encoding: what encoded samples depend on; see :attr:`ShardIndex.encoding`.
        captions: which captions were measured; see :attr:`ShardIndex.captions`.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    content = {
        "version": VERSION,
        "key_bytes": pc.sum(pc.binary_length(table.column("key"))).as_py() or 0,
        "folder": folder,
        "fingerprint": fingerprint,
        "unique": unique,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    content |= {} if encoding is None else {"encoding": encoding}
    content |= {} if captions is None else {"captions": captions}
    table = table.replace_schema_metadata({_METADATA: json.dumps(content)})
    packed = {name: "DELTA_BINARY_PACKED" for name in table.column_names if name.endswith((".offset", ".size"))}
    repeating = [name for name in table.column_names if name not in packed and name != "key"]
    pq.write_table(
        table,
        path,
        row_group_size=_ROWS_AT_ONCE,
        compression="zstd",
        use_dictionary=repeating,
        column_encoding=packed,
    )
