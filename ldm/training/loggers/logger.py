"""Interface of the loggers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ldm.config import Kind


@dataclass(frozen=True)
class LoggedRun:
    """Training whose metrics are written.

    Args:
        folder: folder of the stage, in the run folder.
        stage: name of the stage.
        step: step at which this session starts; rows of later steps, which an interrupted session wrote, will be repeated.
        settings: sections of the config on which the training depends, as plain values.
    """

    folder: Path
    stage: str
    step: int
    settings: Mapping[str, Any]


class Logger(Protocol):
    """Writer of rows of metrics; used by the first rank alone."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Write the metrics of a step."""

    def close(self) -> None:
        """Write what is buffered; called once at the end of the session, also after an error."""


class LoggerConfig(Kind):
    """Family of the loggers, which write the metrics of a training in addition to ``metrics.csv``."""

    def check(self) -> None:
        """Check that the packages of the logger are installed.

        Raises:
            ConfigError: one is missing.
        """

    def open(self, run: LoggedRun) -> Logger:
        """Return a logger that continues the run at its step."""
        raise NotImplementedError
