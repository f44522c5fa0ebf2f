"""Processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import Interrupted

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals that stop a training at the end of a step; SIGUSR1 is what SLURM is usually told to announce the end of a job with."""

THREADS_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which users choose the number of CPU threads."""


@contextmanager
def interruptible(subject: str) -> Iterator[None]:
    """Raise at once upon a signal of a queue within the block.

    Args:
        subject: what is stopped, as the subject of the message.

    Raises:
        Interrupted: the signal was received.
    """

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        raise Interrupted(f"{subject} was stopped by {name}; run the same command to resume it.")

    handlers = set_handlers({number: stop for number in STOP_SIGNALS if number != signal.SIGINT})
    try:
        yield
    finally:
        set_handlers(handlers)


def set_handlers(handlers: Mapping[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Set the handlers of signals and return the former ones; handlers can only be set in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def is_running(pid: int) -> bool:
    """Return True unless it is known that no process has this number; on Windows that is never known."""
    if os.name == "nt":  # where os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def resident_bytes() -> int:
    """Return the bytes of physical memory that this process occupies; outside of Linux, the most that it has occupied."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int | None:
    """Return the bytes of physical memory that processes can get without swapping; None outside of Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
