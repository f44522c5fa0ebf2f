"""Kinds of networks with foreign formats, found by iteration over the modules ``*_formats`` next to the networks.

The package :mod:`ldm.formats` imports this module only where a foreign format is read or written; native files need none.
"""

from __future__ import annotations

import importlib
import pkgutil

import ldm.clip
import ldm.denoiser
import ldm.vae
from ldm.nn.network_format import KINDS, kind_of

__all__ = ["KINDS", "kind_of"]

for _package in (ldm.clip, ldm.denoiser, ldm.vae):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        if _module.name.endswith("_formats"):
            importlib.import_module(_module.name)
