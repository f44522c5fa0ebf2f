"""Shards by the names that the config gives them: files, folders, patterns, URLs and indices."""

from __future__ import annotations

import glob
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.data.shard_index import ShardIndex
from ldm.data.shard_set import INDEX, check_complete, check_replaced
from ldm.data.storage import Location, MissingFileError, is_url, joined, located, matching, name_of, shown
from ldm.errors import DataError
from ldm.paths import expanded

EMOJI = "emoji"  # as a source: the shards shipped with the package


@dataclass
class Found:
    """Shards of a source.

    Attributes:
        paths: the shards, in order.
        indices: indices that were read to find them, by the folder of their shards.
    """

    paths: list[Location] = field(default_factory=list)
    indices: dict[Location, ShardIndex] = field(default_factory=dict)


def find_shards(source: str | Sequence[str], split: str) -> list[Location]:
    """Return the paths and URLs of the shards that a source names, in order.

    Args:
        source: a ``.tar`` file, a folder of them, a pattern with ``*``, ``?``, ``[...]`` or ``{000..012}``, a
            list of those, or ``emoji`` for the packaged set. A URL may stand for each; a folder then needs an index. An index
            (``.parquet``) stands for the shards that it lists.
        split: which of the packaged shards; other sources name their split by their path.

    Raises:
        DataError: a shard that does not exist, or a folder or pattern without any, or shards of an incomplete set.
    """
    return find(source, split).paths


def find(source: str | Sequence[str], split: str) -> Found:
    """Return the shards that a source names, as :func:`find_shards`, with the indices that were read."""
    found = Found()
    for part in [source] if isinstance(source, str) else source:
        if part == EMOJI:
            folder = Path(str(importlib.resources.files("ldm"))) / "assets" / "emoji"
            found.paths += sorted(folder.glob(f"emoji-{split}-*.tar"))
            continue
        for pattern in expand_braces(expanded(part)):
            if pattern.endswith(".parquet"):
                _add_index(found, ShardIndex(located(pattern)))
            elif is_url(pattern):
                _add_remote(found, pattern)
            else:
                _add_local(found, pattern.removeprefix("file://"))
    return found


def find_unindexed(source: str) -> list[Location]:
    """Return the shards of a source, as :func:`find_shards`, of which there may be no index, or only an old one.

    Raises:
        DataError: there are none, or they cannot be listed.
    """
    paths: list[Location] = []
    for pattern in expand_braces(expanded(source)):
        if not is_url(pattern):
            paths += _matches(pattern.removeprefix("file://"))
        elif glob.has_magic(pattern) or name_of(pattern).endswith(".tar"):
            paths += _remote_matches(pattern)
        elif pattern.startswith("http"):
            raise DataError(
                f"the shards of {shown(pattern)} cannot be listed; give a pattern such as .../{{00000..00099}}.tar."
            )
        else:
            paths += _remote_matches(f"{pattern.rstrip('/')}/*.tar")
    return paths


def expand_braces(source: str) -> list[str]:
    """Return the names that a pattern with ``{000..002}`` or ``{a,b}`` stands for, as webdataset expands it."""
    if "{" not in source:
        return [source]
    from webdataset.shardlists import expand_urls  # slow to import

    try:
        return expand_urls(source)
    except ValueError as error:
        raise DataError(
            f"the shards {source!r} cannot be listed ({error}); close each brace, as in {{000..012}}."
        ) from None


def _add_index(found: Found, index: ShardIndex) -> None:
    found.paths += index.paths
    found.indices[index.folder] = index


def _add_local(found: Found, pattern: str) -> None:
    paths, folder = _matches(pattern), Path(pattern)
    found.paths += paths
    if folder.is_dir() and (index := index_of(folder)) is not None:
        index.check_names([name_of(path) for path in paths])
        found.indices[folder] = index


def _add_remote(found: Found, url: str) -> None:
    """Add a remote shard, a pattern of them, or a folder, whose index lists its shards."""
    if name_of(url).endswith(".tar") or glob.has_magic(url):
        found.paths += _remote_matches(url)
    else:
        _add_index(found, remote_index(url))


def _remote_matches(url: str) -> list[Location]:
    if not glob.has_magic(url) or url.startswith("http"):  # which cannot be listed, and where ? has another meaning
        return [url]
    paths: list[Location] = [*matching(url)]
    if not paths:
        raise DataError(f"no shard matches {shown(url)}; check the sources given under data.")
    return paths


def remote_index(folder: Location) -> ShardIndex:
    """Return the index of a remote folder.

    Raises:
        DataError: it has none.
    """
    try:
        return ShardIndex(joined(folder, INDEX))
    except MissingFileError:
        raise DataError(
            f"{shown(folder)} has no {INDEX}, by which remote shards are read; make it with tools/prepare.py index."
        ) from None


def _matches(pattern: str) -> list[Location]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        check_complete(path, found)
        if not found:
            raise DataError(f"the data folder {path} contains no .tar shards; make them with tools/prepare.py folder.")
        return list(found)
    if path.is_file():
        return [path]
    if not glob.has_magic(pattern):
        check_replaced(path.parent)
        raise DataError(f"the shard or data folder {path} does not exist; check the sources given under data.")
    matched = sorted(Path(name) for name in glob.glob(str(path)))  # noqa: PTH207 (the pattern may be absolute)
    if not matched:
        raise DataError(f"no shard matches {pattern}; check the sources given under data.")
    return list(matched)


def index_of(folder: Location) -> ShardIndex | None:
    """Return the index in a folder; None if a local folder has none.

    Raises:
        DataError: a remote folder has none.
    """
    if not isinstance(folder, Path):
        return remote_index(folder)
    return ShardIndex(folder / INDEX) if (folder / INDEX).is_file() else None
