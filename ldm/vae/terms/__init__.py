"""Additional terms of the loss of stage 1, one file each; all modules of this package are imported."""

from __future__ import annotations

from ldm.discovery import import_modules
from ldm.vae.terms.term import LossTerm, LossTermConfig

import_modules(__name__)

__all__ = ["LossTerm", "LossTermConfig"]
