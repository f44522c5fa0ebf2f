"""Cache of remote shards on a local disk, shared by all ranks and workers of a machine.

A complete shard is copied, verified by its checksum, and renamed to its final name, so a file of the cache is complete. A lock
lets one process copy it while others that need it wait. When the cache is full, the shards that were used least recently are
deleted; a process that has just opened one goes on reading it.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config import config_field
from ldm.data.shard_index import IndexedShard
from ldm.data.storage import download, shown
from ldm.errors import ConfigError, StorageError
from ldm.paths import expanded
from ldm.processes import is_running

_SUFFIX, _PART = ".tar", ".part-"
_TOUCHED = 5.0  # seconds between notes that a shard is used
_THREADS = 2  # that read ahead, in each process


@dataclass(frozen=True)
class ShardCacheConfig:
    """Folder and size of the copies of remote shards."""

    folder: str = config_field(
        "~/.cache/ldm/shards", "Folder on a local disk; ranks and workers share it.", changeable=True, path=True
    )
    size: float = config_field(
        32.0, "Size in GiB; beyond it the shards used least recently are deleted.", changeable=True
    )

    def __post_init__(self) -> None:
        if not self.size > 0:
            raise ConfigError(f"size must be positive, not {self.size}.")

    def build(self) -> ShardCache:
        """Return the cache; its folder is created when it is needed."""
        return ShardCache(Path(expanded(self.folder)), round(self.size * 2**30))


class ShardCache:
    """Copies of remote shards.

    Args:
        folder: folder of the copies.
        size: largest size of all copies together, in bytes.
    """

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size
        self._touched: dict[str, float] = {}
        self._reader: _ReadAhead | None = None

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path, int]]:
        return ShardCache, (self.folder, self.size)

    def read(self, url: str, shard: IndexedShard, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a shard from ``offset``; it is copied first if needed.

        Raises:
            StorageError: it cannot be read, is not the one of the index, or does not fit into the cache.
        """
        path = self._path(url, shard)
        while True:
            try:
                with path.open("rb") as file:
                    if os.fstat(file.fileno()).st_size == shard.bytes:
                        self._touch(path)
                        file.seek(offset)
                        return file.read(size)
                path.unlink(missing_ok=True)  # something else has written to it
            except FileNotFoundError:
                pass
            except OSError as error:
                raise self._unusable(error) from None
            self.fetch(url, shard)

    def fetch(self, url: str, shard: IndexedShard, *, wait: bool = True) -> None:
        """Copy a shard, unless the cache has it.

        Args:
            url: the shard.
            shard: its entry in the index.
            wait: wait while another process copies it; otherwise leave it to that process.

        Raises:
            StorageError: as :meth:`read`.
        """
        from filelock import FileLock, Timeout

        if shard.bytes > self.size:
            raise StorageError(
                f"the shard {shown(url)} has {shard.bytes / 2**30:.2f} GiB, more than the cache {self.folder} of "
                f"{self.size / 2**30:.2f} GiB may hold; enlarge data.shard_cache.size."
            )
        path = self._path(url, shard)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), timeout=-1 if wait else 0):
                if not path.is_file():
                    self._copy(url, shard, path)
        except Timeout:
            pass
        except OSError as error:
            raise self._unusable(error) from None

    def read_ahead(self, shards: Sequence[tuple[str, IndexedShard]]) -> None:
        """Copy shards in the background, in order, as far as half of the cache can hold them."""
        if self._reader is None or self._reader.process != os.getpid():  # threads do not survive a fork
            self._reader = _ReadAhead(self)
        room = self.size // 2
        for url, shard in shards:
            room -= shard.bytes
            if room < 0:
                break
            if not self._path(url, shard).is_file():
                self._reader.add(url, shard)

    def _path(self, url: str, shard: IndexedShard) -> Path:
        name = hashlib.blake2b(f"{shown(url)} {shard.checksum}".encode(), digest_size=12).hexdigest()
        return self.folder / f"{name}{_SUFFIX}"

    def _copy(self, url: str, shard: IndexedShard, path: Path) -> None:
        from filelock import FileLock

        part = self.folder / f"{_PART}{os.getpid()}-{threading.get_ident()}"
        try:
            with FileLock(self.folder / "cache.lock"):
                self._make_room(shard.bytes)
                with part.open("wb") as file:
                    file.truncate(shard.bytes)  # so that other processes count it
            found = download(url, part, shard.bytes)
            if found != shard.checksum:
                raise StorageError(
                    f"the shard {shown(url)} is not the one that its index lists, since its checksum differs; make the index "
                    "again with tools/prepare.py index."
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        """Delete the shards used least recently until ``needed`` bytes are free, and what stopped processes have left."""
        files = []
        for path in self.folder.iterdir():
            process = path.name.removeprefix(_PART).partition("-")[0]
            try:
                if path.name.startswith(_PART) and process.isdecimal() and not is_running(int(process)):
                    path.unlink(missing_ok=True)
                elif path.suffix == _SUFFIX or path.name.startswith(_PART):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
            except FileNotFoundError:  # deleted by hand, or just completed
                continue
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used + needed <= self.size:
                return
            if path.suffix == _SUFFIX:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                used -= size

    def _touch(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(path.name, -_TOUCHED) >= _TOUCHED:
            self._touched[path.name] = now
            os.utime(path)

    def _unusable(self, error: OSError) -> StorageError:
        return StorageError(
            f"the shard cache {self.folder} cannot be used ({error.strerror or error}); free space there, or choose another "
            "folder or size with data.shard_cache."
        )


class _ReadAhead:
    """Threads that copy shards in the order of the requests; they end with the process."""

    def __init__(self, cache: ShardCache):
        self.process = os.getpid()
        self._cache = cache
        self._queue: queue.SimpleQueue[tuple[str, IndexedShard]] = queue.SimpleQueue()
        self._pending: set[str] = set()
        for _ in range(_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def add(self, url: str, shard: IndexedShard) -> None:
        if url not in self._pending:
            self._pending.add(url)
            self._queue.put((url, shard))

    def _work(self) -> None:
        while True:
            url, shard = self._queue.get()
            try:
                self._cache.fetch(url, shard, wait=False)
            except StorageError:  # is raised again where the shard is read
                pass
            finally:
                self._pending.discard(url)
