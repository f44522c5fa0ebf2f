"""Files by path or URL: local ones, and those that fsspec reads, such as ``s3://`` and ``https://``.

Errors that may pass, such as a timeout, a reset connection or the answer 503, are tried again with growing delays.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ldm.errors import StorageError, first_line, missing_extra

T = TypeVar("T")

Location = Path | str
"""A local path, or a URL."""

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further attempt, each lengthened at random by up to a half so that ranks do not repeat in step."""

CHUNK = 16 << 20
"""Bytes that one request of a download reads."""


class MissingFileError(StorageError):
    """File that does not exist."""


_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_PASSING_STATUS = {408, 425, 429}
_NETWORK = {"aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "azure", "requests", "urllib3"}
_filesystems: dict[tuple[int, str, str], Any] = {}
_log = logging.getLogger(__name__)


def is_url(source: str) -> bool:
    """Return True for a URL other than ``file://``."""
    return _URL.match(source) is not None and not source.startswith("file://")


def located(source: str) -> Location:
    """Return the URL, or the local path, that a text names."""
    return source if is_url(source) else Path(source.removeprefix("file://"))


def shown(location: Location) -> str:
    """Return a location for messages, without the password or signature that a URL may contain."""
    if isinstance(location, Path):
        return str(location)
    parts = urlsplit(location)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def name_of(location: Location) -> str:
    """Return the last part of a path or URL."""
    return location.name if isinstance(location, Path) else urlsplit(location).path.rstrip("/").rpartition("/")[2]


def folder_of(location: Location) -> Location:
    """Return the folder that contains a file."""
    if isinstance(location, Path):
        return location.parent
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


def joined(folder: Location, name: str) -> Location:
    """Return a file of a folder; the query of a URL is kept."""
    if isinstance(folder, Path):
        return folder / name
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def read_range(url: str, offset: int, size: int) -> bytes:
    """Return ``size`` bytes of a file from ``offset``, or fewer where it ends; from a server without ranges, the complete file.

    Raises:
        StorageError: it cannot be read, also after further attempts.
    """
    return attempted(url, lambda fs, path: fs.cat_file(path, start=offset, end=offset + size)) if size > 0 else b""


def size_of(url: str) -> int | None:
    """Return the size of a file in bytes; None if the server does not tell.

    Raises:
        StorageError: it cannot be reached, also after further attempts.
    """
    size: int | None = attempted(url, lambda fs, path: fs.info(path)).get("size")
    return size


def exists(location: Location) -> bool:
    """Return True if there is such a file.

    Raises:
        StorageError: its server cannot be reached, also after further attempts.
    """
    if isinstance(location, Path):
        return location.is_file()
    try:
        attempted(location, lambda fs, path: fs.info(path))
    except MissingFileError:
        return False
    return True


def matching(pattern: str) -> list[str]:
    """Return the URLs of the files that a pattern with ``*``, ``?`` or ``[...]`` matches, sorted.

    Raises:
        StorageError: they cannot be listed, also after further attempts.
    """
    found = attempted(pattern, lambda fs, path: [fs.unstrip_protocol(name) for name in fs.glob(path)])
    return sorted(found)


def download(url: str, target: Path, size: int | None = None) -> str:
    """Copy a file to a local path and return its checksum (see :func:`checksum`).

    Args:
        url: the file.
        target: where to write; not atomic. If it exists, it may have room reserved.
        size: its size in bytes, if it is known.

    Raises:
        StorageError: it cannot be read, also after further attempts, or does not have this size.
    """
    digest, position = hashlib.blake2b(digest_size=16), 0
    total = size_of(url) if size is None else size
    with target.open("r+b" if target.exists() else "wb") as file:
        while total is None or position < total:
            data = read_range(url, position, CHUNK)  # the last request may show that the file has grown
            file.write(data)
            digest.update(data)
            position += len(data)
            if len(data) != CHUNK:
                break
        file.truncate()
    if total is not None and position != total:
        raise StorageError(f"{shown(url)} has {position} bytes instead of {total}; it was replaced or is incomplete.")
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """Return the BLAKE2b hash (128 bits, hexadecimal) of a local file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def upload(path: Path, url: str) -> None:
    """Copy a local file to a URL.

    Raises:
        StorageError: it cannot be written, also after further attempts.
    """
    attempted(url, lambda fs, target: fs.put_file(str(path), target), "written")


def remove_folder(url: str) -> None:
    """Delete a folder with its files, if it exists.

    Raises:
        StorageError: it cannot be deleted, also after further attempts.
    """
    attempted(url, lambda fs, target: fs.exists(target) and fs.rm(target, recursive=True), "deleted")


def attempted(url: str, work: Callable[[Any, str], T], done: str = "read") -> T:
    """Return the result of ``work(filesystem, path)``, which is tried again after errors that may pass.

    Raises:
        StorageError: it fails for good.
        MissingExtraError: a package is missing.
    """
    for delay in (*DELAYS, None):
        try:
            return work(*_filesystem(url))
        except ImportError:
            if url.startswith("s3"):
                raise missing_extra("s3fs", f"reading {shown(url)}", "s3") from None
            raise
        except Exception as error:
            if delay is None or not _may_pass(error):
                raise _failure(url, done, error, delay is None) from None
            _log.warning("%s cannot be %s (%s); trying again in %g s", shown(url), done, first_line(error), delay)
            time.sleep(delay * (1 + secrets.randbelow(500) / 1000))
    raise AssertionError


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's filesystem and the path in it.

    fsspec itself keeps one for each thread, and closes those of the parent in a forked worker, which takes long; here all
    threads of a process share one, and its connections.
    """
    import fsspec

    key = os.getpid(), url.partition("://")[0], urlsplit(url).netloc
    if key in _filesystems:
        return _filesystems[key], _filesystems[key]._strip_protocol(url)

    options: dict[str, Any] = {}
    protocol = url.partition("://")[0].lower()
    if protocol in ("http", "https"):
        import aiohttp

        # The default allows 5 minutes for a request, and a stalled one would take all of them.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    elif protocol == "s3":
        options["use_listings_cache"] = False
    try:
        fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ValueError as error:
        raise StorageError(f"{shown(url)} cannot be read ({first_line(error)}); give a path or another URL.") from None
    return _filesystems.setdefault(key, fs), path


def _may_pass(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec says so of any error when it asks for the size of a file by HTTP
    status = getattr(error, "status", None)  # of aiohttp.ClientResponseError
    if isinstance(status, int):
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    if "Credentials" in type(error).__name__:  # botocore.exceptions.NoCredentialsError and others
        return False
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in _NETWORK


def _failure(url: str, done: str, error: Exception, repeated: bool) -> StorageError:
    if isinstance(error, StorageError):
        return error
    if isinstance(error, FileNotFoundError):
        return MissingFileError(f"{shown(url)} does not exist; check the sources given under data.")
    reason = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
    often = f"also after {len(DELAYS)} further attempts" if repeated else "and further attempts would not help"
    remedy = "check the address and the credentials" if not repeated else "check the network and repeat the command"
    return StorageError(f"{shown(url)} cannot be {done} ({reason}), {often}; {remedy}.")
