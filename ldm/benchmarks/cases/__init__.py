"""Cases, one file for each family; all modules of this package are imported, so that a new case needs no entry here."""

from __future__ import annotations

from ldm.discovery import import_modules

import_modules(__name__)
