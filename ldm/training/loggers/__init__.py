"""Loggers: where metrics are written in addition to ``metrics.csv``, one kind in each file."""

from __future__ import annotations

from ldm.discovery import import_modules
from ldm.training.loggers.logger import LoggedRun, Logger, LoggerConfig

import_modules(__name__)

__all__ = ["LoggedRun", "Logger", "LoggerConfig"]
