"""Optimizers, one kind in each file."""

from __future__ import annotations

from ldm.discovery import import_modules
from ldm.training.optimizers.optimizer import OptimizerConfig, set_learning_rate

import_modules(__name__)

__all__ = ["OptimizerConfig", "set_learning_rate"]
