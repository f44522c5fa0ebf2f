"""Raw conditions, one file each: captions, labels, boxes, maps, images.

All modules of this package are imported, so that a new modality needs no entry elsewhere.
"""

from __future__ import annotations

from ldm.discovery import import_modules
from ldm.modalities.base import MODALITIES, Modality

__all__ = ["MODALITIES", "Modality"]

import_modules(__name__)
