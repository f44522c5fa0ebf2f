"""Reading of remote shards: samples of a batch by requests for ranges, or complete shards through the cache."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ldm.data.shard_cache import ShardCache
from ldm.data.shard_index import IndexedShard
from ldm.data.storage import Location, read_range, shown
from ldm.errors import StorageError

_REQUESTS = 16  # that are sent at a time for a batch


class RemoteShards:
    """The remote ones among the shards of a set.

    Args:
        paths: all shards.
        listed: entry of each in its index.
        cache: cache for complete shards; None: each sample is read by a request of its own.

    Attributes:
        shards: URL and entry of each remote shard, by its number.
        cache: the cache.
    """

    def __init__(self, paths: Sequence[Location], listed: Sequence[IndexedShard | None], cache: ShardCache | None):
        self.cache = cache
        self.shards = {
            number: (path, shard)
            for number, (path, shard) in enumerate(zip(paths, listed, strict=True))
            if shard is not None and not isinstance(path, Path)
        }
        self._prepared: dict[int, tuple[int, bytes]] = {}  # offset and content of the samples of a batch, by row

    @property
    def total_bytes(self) -> int:
        """Size of all."""
        return sum(shard.bytes for _, shard in self.shards.values())

    @property
    def copied(self) -> bool:
        """True if shards are read through the cache."""
        return self.cache is not None and len(self.shards) > 0

    def read_ahead(self, numbers: Sequence[int]) -> None:
        """Copy shards to the cache in the background, in order."""
        assert self.cache is not None
        self.cache.read_ahead([self.shards[number] for number in numbers if number in self.shards])

    def prepare(self, samples: Sequence[tuple[int, int, Sequence[tuple[int, int]]]]) -> None:
        """Read samples by requests that are sent together, for the next calls of :meth:`read`.

        Args:
            samples: of each its row, the number of its shard, and offset and size of its members (size -1: there is none).
        """
        spans = {}
        for row, number, members in samples:
            if number in self.shards:
                first = min(offset for offset, size in members if size >= 0)
                spans[row] = first, max(offset + size for offset, size in members) - first, self.shards[number][0]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            contents = pool.map(lambda span: read_range(span[2], span[0], span[1]), spans.values())
            self._prepared = {
                row: (first, content)
                for (row, (first, size, _)), content in zip(spans.items(), contents, strict=True)
                if len(content) == size
            }

    def read(self, row: int, number: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a shard from ``offset``, which belong to the sample in a row.

        Raises:
            StorageError: they cannot be read.
        """
        url, shard = self.shards[number]
        if self.cache is not None:
            return self.cache.read(url, shard, offset, size)
        first, content = self._prepared.get(row, (0, b""))
        data = content[offset - first : offset - first + size] or read_range(url, offset, size)
        if len(data) != size:
            raise StorageError(
                f"{len(data)} bytes of the shard {shown(url)} were received instead of {size}; it was replaced since it was "
                "indexed, or its server does not support requests for ranges."
            )
        return data
