"""What the denoiser listens to: text, class label, nothing. Each conditioner fills a Conditioning record."""

from __future__ import annotations

from ldm.conditioning.conditioner import Conditioner, ConditionerKind, NoConditioner
from ldm.conditioning.inpaint import InpaintConditioner
from ldm.conditioning.label import ClassConditioner
from ldm.conditioning.low_res import LowResConditioner
from ldm.conditioning.phases import Phases, phased
from ldm.conditioning.text import TextConditioner

__all__ = [
    "ClassConditioner",
    "Conditioner",
    "ConditionerKind",
    "InpaintConditioner",
    "LowResConditioner",
    "NoConditioner",
    "Phases",
    "TextConditioner",
    "phased",
]
