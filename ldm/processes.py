"""Processes of this machine."""

from __future__ import annotations

import os


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
