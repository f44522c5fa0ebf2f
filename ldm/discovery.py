"""Import of all modules of a package, for kinds that register themselves: a new one is a file without an entry elsewhere."""

from __future__ import annotations

import importlib
import pkgutil


def import_modules(package: str, suffix: str = "") -> None:
    """Import the modules of a package whose names end with ``suffix``, in alphabetical order."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name.endswith(suffix):
            importlib.import_module(f"{package}.{module.name}")
