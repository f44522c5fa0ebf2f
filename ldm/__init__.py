"""Train a text-to-image latent diffusion model from your own images and captions, and use it.

>>> from ldm import Pipeline
>>> Pipeline("a red apple")[0].save("apple.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.formats import load
    from ldm.model import LatentDiffusion
    from ldm.pipeline import Pipeline
    from ldm.training.experiment import load_config

__version__ = "0.1.0"
__all__ = ["LatentDiffusion", "Pipeline", "__version__", "load", "load_config"]

_MODULES = {
    "LatentDiffusion": "ldm.model",
    "Pipeline": "ldm.pipeline",
    "load": "ldm.formats",
    "load_config": "ldm.training.experiment",
}


def __getattr__(name: str) -> Any:
    # Imported at first access (PEP 562), so that a command's --help does not import torch, and a pipeline does not
    # import what only training needs.
    if name not in _MODULES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value
