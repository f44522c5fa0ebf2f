"""Lock of a stage of a run folder, so that one process at a time trains it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ldm.errors import TrainingError
from ldm.formats.tensors import write_atomically
from ldm.processes import is_running

GRACE = 20.0
"""Seconds to wait for a lock whose process is gone: its data workers, which share the lock, notice that within seconds."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` within the block.

    The lock belongs to the process and ends with it, however it ends; a file next to it names the process for others.

    Raises:
        TrainingError: another process holds it, or the folder cannot be written to.
    """
    lock, owner = FileLock(folder / ".lock"), folder / ".lock.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        holder = _read(owner)
        try:
            lock.acquire(timeout=0 if _may_run(holder) else GRACE)
        except Timeout:
            who = f"process {holder['pid']} on {holder['host']} ({holder['command']})" if holder else "another process"
            raise TrainingError(
                f"{folder} is being trained by {who}; wait for it, stop it, or give another run_dir."
            ) from None
    except OSError as error:
        raise TrainingError(
            f"the folder {folder} cannot be written to ({error.strerror}); give another run_dir."
        ) from None
    try:
        process = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
        write_atomically(owner, lambda path: path.write_text(json.dumps(process), encoding="utf-8"))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return True if a process holds the lock of ``folder``, or may hold it on another host."""
    holder = _read(folder / ".lock.json")
    return bool(holder) and _may_run(holder)


def _read(owner: Path) -> dict[str, Any]:
    """Return the description of the process that holds a lock; empty if it has not been written yet."""
    try:
        found: dict[str, Any] = json.loads(owner.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _may_run(holder: dict[str, Any]) -> bool:
    """Return True unless it is known that the process is gone."""
    return not holder or holder["host"] != socket.gethostname() or is_running(holder["pid"])
