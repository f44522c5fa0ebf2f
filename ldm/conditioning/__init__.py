"""Conditioners: encoders of raw conditions (text, labels, images, boxes, maps) into the record that the denoiser takes.

All modules of this package are imported, so that a new conditioner registers its config kind without an entry here.
"""

from __future__ import annotations

from ldm.conditioning.boxes import BoxesConditioner
from ldm.conditioning.composite import CompositeConditioner
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, NoConditioner
from ldm.conditioning.image import ImageConditioner
from ldm.conditioning.inpaint import InpaintConditioner
from ldm.conditioning.label import ClassConditioner
from ldm.conditioning.low_res import LowResConditioner
from ldm.conditioning.prompt_schedule import ConditioningSchedule, conditioning_schedules
from ldm.conditioning.sdxl import SDXLConditioner
from ldm.conditioning.semantic import SemanticConditioner
from ldm.conditioning.text import TextConditioner
from ldm.conditioning.transformer import TransformerConditioner
from ldm.discovery import import_modules

__all__ = [
    "BoxesConditioner",
    "ClassConditioner",
    "CompositeConditioner",
    "Conditioner",
    "ConditionerConfig",
    "ConditioningSchedule",
    "ImageConditioner",
    "InpaintConditioner",
    "LowResConditioner",
    "NoConditioner",
    "SDXLConditioner",
    "SemanticConditioner",
    "TextConditioner",
    "TransformerConditioner",
    "conditioning_schedules",
]

import_modules(__name__)
