"""What the denoiser listens to: text, class label, picture, boxes, map, several of them or nothing; each fills a Conditioning."""

from __future__ import annotations

from ldm.conditioning.boxes import BoxesConditioner
from ldm.conditioning.conditioner import Conditioner, ConditionerKind, NoConditioner
from ldm.conditioning.image import ImageConditioner
from ldm.conditioning.label import ClassConditioner
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
    "NoConditioner",
    "SemanticConditioner",
    "SeveralConditioners",
    "TextConditioner",
    "TransformerConditioner",
]
