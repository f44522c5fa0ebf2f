"""Loggers: where metrics are written in addition to ``metrics.csv``, one kind in each file."""

from __future__ import annotations

import importlib
import pkgutil

from ldm.training.loggers.logger import LoggedRun, Logger, LoggerConfig

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LoggedRun", "Logger", "LoggerConfig"]
