"""What the denoiser listens to: text, labels, pictures, boxes, maps, several of them or nothing; each fills a Conditioning."""

from __future__ import annotations

from ldm.conditioning.boxes import BoxesConditioner
from ldm.conditioning.conditioner import Conditioner, ConditionerKind, NoConditioner
from ldm.conditioning.image import ImageConditioner
from ldm.conditioning.inpaint import InpaintConditioner
from ldm.conditioning.label import ClassConditioner
from ldm.conditioning.low_res import LowResConditioner
from ldm.conditioning.phases import Phases, phased
from ldm.conditioning.sdxl import SDXLConditioner
from ldm.conditioning.semantic import SemanticConditioner
from ldm.conditioning.several import SeveralConditioners
from ldm.conditioning.text import TextConditioner
from ldm.conditioning.transformer import TransformerConditioner

__all__ = [
    "BoxesConditioner",
    "ClassConditioner",
    "Conditioner",
    "ConditionerKind",
    "ImageConditioner",
    "InpaintConditioner",
    "LowResConditioner",
    "NoConditioner",
    "Phases",
    "SDXLConditioner",
    "SemanticConditioner",
    "SeveralConditioners",
    "TextConditioner",
    "TransformerConditioner",
    "phased",
]
