"""Raw conditions, one file each: captions, labels, boxes, maps, images.

All modules of this package are imported, so that a new modality needs no entry elsewhere.
"""

from __future__ import annotations

import importlib
import pkgutil

from ldm.modalities.base import MODALITIES, Modality

__all__ = ["MODALITIES", "Modality"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
