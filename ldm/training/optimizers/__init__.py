"""Optimizers, one kind in each file."""

from __future__ import annotations

import importlib
import pkgutil

from ldm.training.optimizers.optimizer import OptimizerConfig, set_learning_rate

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OptimizerConfig", "set_learning_rate"]
