"""Commands run in the process of a test."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


def exit_code(monkeypatch: pytest.MonkeyPatch, main: Callable[[], object], *arguments: object) -> int:
    """Return the exit code of the ``main`` of a command; the first of the arguments is the name of the command."""
    monkeypatch.setattr(sys, "argv", [str(each) for each in arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)
