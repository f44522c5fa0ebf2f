"""Perceptual loss by the image tower of stage 2, which needs no weights of other projects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.vae.terms.term import LossTerm, LossTermConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from ldm.vae.first_stage import FirstStageConfig


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig(LossTermConfig, kind="perceptual"):
    """Distance of the hidden states of the image tower of a CLIP that was trained before, as by LPIPS (Zhang et al. 2018)."""

    checkpoint: str = config_field(
        help="source of the CLIP: clip/final.safetensors of a run, or any other source of an image tower", path=True
    )
    layers: tuple[int, ...] = config_field(
        (), "blocks of the tower whose outputs are compared, counted from 1; empty: all"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layers, default=1) < 1 or len({*self.layers}) < len(self.layers):
            raise ConfigError(f"layers must be different numbers from 1, not {list(self.layers)}.")

    @property
    def image_encoder(self) -> str:
        return self.checkpoint

    def check_model(self, model: FirstStageConfig) -> None:
        if model.image_channels != 3:
            raise ConfigError(
                f"loss.terms: perceptual needs images with 3 channels, but they have {model.image_channels}."
            )

    def build(self, image_encoder: nn.Module | None = None) -> Perceptual:
        assert image_encoder is not None
        return Perceptual(image_encoder, self.layers, self.checkpoint)


class Perceptual(LossTerm):
    """Mean over layers and positions of the squared distance of hidden states of unit length (arXiv 1801.03924, eq. 1, w = 1).

    Args:
        encoder: image tower with ``block_states``; it is frozen and stays in evaluation mode.
        layers: numbers of its blocks, from 1; empty: all.
        source: where the tower is from, for error messages.

    Raises:
        ConfigError: the tower has fewer blocks.
    """

    def __init__(self, encoder: nn.Module, layers: Sequence[int], source: str):
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        tower: Any = encoder
        blocks = len(tower.blocks)
        self.layers = tuple(layers) or tuple(range(1, blocks + 1))
        if max(self.layers) > blocks:
            raise ConfigError(
                f"vae.loss.terms: layers of perceptual names block {max(self.layers)}, but the image tower of {source} "
                f"has {blocks}."
            )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()
        return self

    def distance(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        tower: Any = self.encoder
        with torch.no_grad():
            expected = tower.block_states(image)
        found = tower.block_states(reconstruction)
        total = image.new_zeros(len(image))
        for layer in self.layers:
            difference = _unit(found[layer - 1]) - _unit(expected[layer - 1])
            total = total + difference.square().sum(-1).mean(-1)
        return total / len(self.layers)


def _unit(states: Tensor) -> Tensor:
    """Scale the vectors of ``states [b n width]`` to unit length."""
    return F.normalize(states.float(), dim=-1)
