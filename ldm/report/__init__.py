"""Report of a run as one HTML page, which needs no other file and no connection."""

from __future__ import annotations
