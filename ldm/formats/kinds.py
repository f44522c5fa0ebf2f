"""Kinds of networks with foreign formats, found by iteration over the modules ``*_formats`` next to the networks.

The package :mod:`ldm.formats` imports this module only where a foreign format is read or written; native files need none.
"""

from __future__ import annotations

from ldm.discovery import import_modules
from ldm.nn.network_format import KINDS, kind_of

__all__ = ["KINDS", "kind_of"]

for _package in ("ldm.clip", "ldm.denoiser", "ldm.vae"):
    import_modules(_package, "_formats")
