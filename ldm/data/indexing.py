"""Making of the index of shards: reads every shard once, in several processes, and can be continued after an interruption."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ldm.data.bad_samples import BadSample
from ldm.data.measures import IndexOptions, columns_of, language_identifier, measured
from ldm.data.shard_format import scan_shard
from ldm.data.shard_index import (
    IndexedShard,
    ShardIndex,
    Table,
    joined_tables,
    table_of,
    tail_of,
    write_index,
)
from ldm.data.shard_set import INDEX
from ldm.data.shards import Shards
from ldm.data.sources import find_unindexed
from ldm.data.storage import (
    Location,
    attempted,
    checksum,
    download,
    folder_of,
    joined,
    located,
    name_of,
    shown,
    upload,
)
from ldm.errors import DataError
from ldm.formats.tensors import write_atomically

_PART = b"ldm.part"


def make_index(
    source: str,
    out: str | None = None,
    *,
    workers: int = 4,
    work: Path | None = None,
    options: IndexOptions | None = None,
) -> ShardIndex:
    """Make the index of the shards of a folder, and return it.

    Args:
        source: a folder of shards or a pattern, local or as a URL, as in the config; over HTTP a pattern with braces.
        out: the index; None: ``index.parquet`` in the folder of the shards.
        workers: number of processes.
        work: folder of intermediate results, which are used again after an interruption and deleted at the end. None: next to the
            index, or for a remote one in the folder for temporary files.
        options: what the index holds.

    Raises:
        DataError: the shards lie in several folders, or cannot be read.
    """
    options = options or IndexOptions()
    if options.languages:
        language_identifier(options.languages)  # a mistake ends here, before any shard is read
    paths = find_unindexed(source)
    folder = folder_of(paths[0])
    if any(folder_of(path) != folder for path in paths):
        raise DataError(f"the shards of {source} lie in several folders; make an index in each of them.")
    target = joined(folder, INDEX) if out is None else located(out)
    if isinstance(target, str) and target.startswith("http"):
        raise DataError(
            f"nothing can be written to {shown(target)}; give a local file with --out, and use it as the source."
        )
    if work is None:
        name = f"ldm-indexing-{hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()}"
        work = target.parent / ".indexing" if isinstance(target, Path) else Path(tempfile.gettempdir()) / name
    elsewhere = folder.resolve() if isinstance(folder, Path) else folder
    index_shards(
        paths,
        target,
        workers=workers,
        work=work,
        options=options,
        folder=None if folder_of(target) == folder else str(elsewhere),
    )
    return ShardIndex(target)


def index_shards(
    paths: Sequence[Location],
    target: Location,
    *,
    workers: int,
    work: Path,
    options: IndexOptions,
    folder: str | None = None,
) -> None:
    """Write the index of shards of one folder; see :func:`make_index`.

    Args:
        paths: the shards, in order.
        target: the index.
        workers: number of processes; 0 or 1: this one.
        work: folder of intermediate results.
        options: what the index holds.
        folder: folder of the shards, if it is not that of the index.
    """
    work.mkdir(parents=True, exist_ok=True)
    parts = [work / f"{name_of(path)}.parquet" for path in paths]
    _measure_all(paths, parts, workers, options)
    table, shards = join_parts(parts)
    provisional, fingerprint = work / INDEX, fingerprint_of_shards(shards)
    captions = {"field": options.caption_field, "format": options.caption_format}
    write = functools.partial(write_index, table=table, shards=shards, captions=captions)
    write(provisional, fingerprint=fingerprint, unique=False, folder=str(folder_of(paths[0])))
    opened = Shards(paths, indices={folder_of(paths[0]): ShardIndex(provisional)})
    if all(isinstance(path, Path) for path in paths):
        # That of shards without an index: a run that was trained on them can be resumed.
        fingerprint = opened.content_fingerprint()
    file = target if isinstance(target, Path) else provisional
    write_atomically(file, lambda path: write(path, fingerprint=fingerprint, unique=opened.unique, folder=folder))
    if not isinstance(target, Path):
        upload(provisional, target)
    shutil.rmtree(work)


def join_parts(parts: Sequence[Path]) -> tuple[Table, list[IndexedShard]]:
    """Return the rows of the shards that :func:`write_part` wrote, and the shards."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(part) for part in parts]
    shards = [IndexedShard.from_dict(json.loads(table.schema.metadata[_PART])["shard"]) for table in tables]
    return joined_tables(tables), shards


def fingerprint_of_shards(shards: Sequence[IndexedShard]) -> str:
    """Return the fingerprint of shards that are too far away to read parts of their members."""
    return hashlib.blake2b("/".join(shard.checksum for shard in shards).encode(), digest_size=16).hexdigest()


def _measure_all(paths: Sequence[Location], parts: Sequence[Path], workers: int, options: IndexOptions) -> None:
    from tqdm import tqdm

    with tqdm(total=len(paths), desc="indexing", unit="shard", disable=len(paths) < 2) as bar:
        if min(workers, len(paths)) <= 1:
            for path, part in zip(paths, parts, strict=True):
                _measure(path, part, options)
                bar.update()
            return
        with ProcessPoolExecutor(min(workers, len(paths))) as pool:
            for _ in pool.map(_measure, paths, parts, itertools.repeat(options)):
                bar.update()


def _measure(path: Location, part: Path, options: IndexOptions) -> None:
    """Write the rows of a shard to a file of its own, unless it is there already."""
    stamp = [_stamp(path), dataclasses.asdict(options)]
    if _is_made(part, stamp):
        return
    if isinstance(path, Path):
        write_part(path, path, checksum(path), part, stamp, options)
        return
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        copy = Path(folder) / name_of(path)
        write_part(path, copy, download(path, copy), part, stamp, options)


def _stamp(path: Location) -> str:
    """Return a text that changes when a shard is replaced."""
    if isinstance(path, Path):
        status = path.stat()
        return f"{status.st_size}-{status.st_mtime_ns}"
    info = attempted(path, lambda fs, name: fs.info(name))
    return "-".join(str(info.get(name)) for name in ("size", "ETag", "etag", "LastModified", "mtime", "updated"))


def _is_made(part: Path, stamp: list[Any]) -> bool:
    return bool(stamp_of(part) == json.loads(json.dumps(stamp)))


def stamp_of(part: Path) -> Any:
    """Return the stamp of a file of rows, as :func:`write_part` got it; None if there is no complete one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads(pq.read_schema(part).metadata[_PART])["stamp"]
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError):
        return None


def write_part(
    location: Location,
    path: Path,
    digest: str,
    part: Path,
    stamp: Any,
    options: IndexOptions,
    bad: Sequence[BadSample] = (),
) -> None:
    """Write the rows of a shard to a file of its own.

    Args:
        location: the shard.
        path: a local copy of it.
        digest: its checksum.
        part: the file.
        stamp: JSON value that tells whether the rows are still those of the shard; see :func:`stamp_of`.
        options: what the index holds.
        bad: further samples that the shard does not contain, since they were bad.
    """
    import pyarrow.parquet as pq

    rows: dict[int, dict[str, Any]] = {}

    def visit(row: int, column: str, data: bytes) -> None:
        rows.setdefault(row, {}).update(measured(column, data, options))

    try:
        content = scan_shard(path, visit)
    except DataError as error:
        raise DataError(str(error).replace(str(path), shown(location))) from None
    n = len(content.table)
    columns = columns_of([rows.get(row, {}) for row in range(n)])
    dropped = (*(dataclasses.replace(each, shard=shown(location)) for each in content.dropped), *bad)
    shard = IndexedShard(name_of(location), n, path.stat().st_size, digest, tail_of(path), content.checksum, dropped)
    about = json.dumps({"stamp": stamp, "shard": dataclasses.asdict(shard)})
    table = table_of(content.table, columns).replace_schema_metadata({_PART: about})
    write_atomically(part, lambda file: pq.write_table(table, file))
