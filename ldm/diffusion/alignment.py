"""Representation alignment (REPA): a hidden state of the denoiser is aligned with features of the clean image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.config import config_field
from ldm.diffusion.loss import WeightedLoss, WeightedLossConfig
from ldm.errors import ConfigError

SIDE = 32
"""Side of the image from which the channels of the teacher's feature maps are read."""


@dataclass(frozen=True)
class RepresentationAlignmentConfig(WeightedLossConfig, kind="repa"):
    """The loss of kind `weighted` minus strength mean_n cos(y_n, MLP(h_n)) (REPA; Yu et al. 2410.06940).

    h_n are the positions of the output of a block of the denoiser for the noisy image, and y_n those of a block of the teacher
    for the clean one, resized to as many. The teacher is the image tower of a CLIP, or a network of timm. The MLP is trained with
    the denoiser and is not part of its result.
    Validations report the loss without the second term.
    """

    reads_images: ClassVar[bool] = True

    strength: float = config_field(0.5, "Factor lambda of the alignment.")
    feature: str = config_field("middle.0", "Module of the denoiser whose output, a feature map, is aligned.")
    checkpoint: str | None = config_field(
        None,
        "Source of the teacher: clip/final.safetensors of a run, or any other source of an image tower; timm:NAME or "
        "timm:NAME=FILE for a network of timm; null = stage clip of this experiment.",
        path=True,
    )
    layer: int | None = config_field(
        None, "Block of the teacher whose output is the target, counted from 1; null = the last."
    )
    hidden_width: int = config_field(2048, "Width of the two hidden layers of the MLP.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength < math.inf:
            raise ConfigError(f"strength is {self.strength}; it must be at least 0 and finite.")
        if self.hidden_width < 1 or (self.layer is not None and self.layer < 1):
            raise ConfigError(
                f"hidden_width is {self.hidden_width} and layer {self.layer}; both must be at least 1, or layer null."
            )

    @property
    def features(self) -> tuple[str, ...]:
        return (self.feature,)

    @property
    def image_encoder(self) -> str | None:
        return self.checkpoint

    def layer_of(self, image_encoder: nn.Module) -> int:
        teacher: Any = image_encoder
        layer: int = teacher.depth if self.layer is None else self.layer
        if layer > teacher.depth:
            raise ConfigError(
                f"layer of repa is {layer}, but the teacher has {teacher.depth} blocks; name one of them."
            )
        return layer

    def build(self) -> WeightedLoss:
        """Build the loss without the second term."""
        return WeightedLoss(self)

    def build_aligned(self, channels: Sequence[int], image_encoder: nn.Module) -> RepresentationAlignment:
        return RepresentationAlignment(self, channels[0], image_encoder)


class RepresentationAlignment(WeightedLoss):
    """The loss of a :class:`RepresentationAlignmentConfig`.

    Args:
        config: its config.
        channels: channels of the output of the module ``feature``.
        encoder: teacher with ``depth`` and ``feature_map``, an :class:`ldm.clip.image.ImageTower` or
            :class:`ldm.clip.timm_tower.TimmTower`; it is frozen and stays in evaluation mode.

    Raises:
        ConfigError: the teacher has fewer blocks than ``layer``.
    """

    config: RepresentationAlignmentConfig

    def __init__(self, config: RepresentationAlignmentConfig, channels: int, encoder: nn.Module):
        super().__init__(config)
        self.encoder = encoder.requires_grad_(False).eval()
        self.layer, width, teacher = config.layer_of(encoder), config.hidden_width, cast(Any, encoder)
        with torch.no_grad():
            features: Tensor = teacher.feature_map(torch.zeros(1, 3, SIDE, SIDE), self.layer)
        self.projection = nn.Sequential(
            nn.Linear(channels, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, features.shape[1]),
        )

    def train(self, mode: bool = True) -> RepresentationAlignment:
        super().train(mode)
        self.encoder.eval()
        return self

    def feature_term(self, features: Mapping[str, Tensor], teacher: Tensor | None) -> Tensor | float:
        if teacher is None:
            return 0.0
        hidden = features[self.config.feature]
        projected = self.projection(hidden.movedim(1, -1)).movedim(-1, 1)
        return -self.config.strength * similarity(projected, resized(teacher, hidden.shape[2:]))


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return feature maps ``[b z h w]`` at ``size`` (h, w), bilinear with antialiasing."""
    if maps.shape[2:] == tuple(size):
        return maps
    return functional.interpolate(maps, tuple(size), mode="bilinear", antialias=True)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine similarity of feature maps ``[b c h w]`` at each position, averaged over these, ``[b]`` fp32."""
    return functional.cosine_similarity(a.float(), b.float(), dim=1).flatten(1).mean(1)
