from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ldm.processes import is_running


def test_a_process_runs_until_it_ends() -> None:
    assert is_running(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert is_running(process.pid)
        process.communicate()
    if os.name != "nt":
        assert not is_running(process.pid)


def test_a_process_of_another_user_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert is_running(1)
