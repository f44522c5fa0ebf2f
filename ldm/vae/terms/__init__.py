"""Additional terms of the loss of stage 1, one file each; all modules of this package are imported."""

from __future__ import annotations

import importlib
import pkgutil

from ldm.vae.terms.term import LossTerm, LossTermConfig

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LossTerm", "LossTermConfig"]
