"""Cases, one file for each family; all modules of this package are imported, so that a new case needs no entry here."""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
