"""EQ-VAE: latents that rotate and scale with the image (Kouzelis et al. 2025, arXiv 2502.09509)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.vae.terms.term import LossTerm, LossTermConfig


@dataclass(frozen=True)
class EquivarianceConfig(LossTermConfig, kind="equivariance"):
    """Decoding of rotated and scaled latents, compared with images transformed alike, in a share of the batches (EQ-VAE)."""

    trains_encoder: ClassVar[bool] = True

    probability: float = config_field(0.5, "share of the batches that are transformed")
    min_scale: float = config_field(
        0.25, "smallest scale of latents and images; it is drawn from there to 1, and 1 leaves only rotations"
    )
    rotations: bool = config_field(True, "rotate by 90, 180 or 270 degrees, each equally often")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight != 1:
            raise ConfigError(
                "weight has no effect on equivariance, which replaces images and latents; use probability."
            )
        if not 0 < self.probability <= 1 or not 0 < self.min_scale <= 1:
            raise ConfigError(
                f"probability and min_scale must be above 0 and at most 1, not {self.probability} and {self.min_scale}."
            )
        if self.min_scale == 1 and not self.rotations:
            raise ConfigError("min_scale is 1 and rotations is false, which transforms nothing; remove the term.")

    def smallest(self, side: int, factor: int) -> int:
        return _scaled(side // factor, self.min_scale) * factor

    def build(self, image_encoder: nn.Module | None = None) -> Equivariance:
        return Equivariance(self)


class Equivariance(LossTerm):
    """Transformation of the batch whose reconstruction loss is L(t(x), D(t(z))) instead of L(x, D(z)) (eq. 7).

    t is one scale and one rotation for the batch of all ranks. Unlike the paper's,
    the bilinear interpolation is antialiased.
    """

    def __init__(self, config: EquivarianceConfig):
        super().__init__()
        self.config = config
        # costs are counted for a batch that is not transformed, which takes the most
        self.active = not torch.empty(0).is_meta

    def transform(self, image: Tensor, latent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if not self.active:
            return image, latent
        chance, size, turn = torch.rand(3, generator=generator, device=generator.device).tolist()
        if chance >= self.config.probability:
            return image, latent
        scale = self.config.min_scale + (1 - self.config.min_scale) * size
        turns = 1 + math.floor(3 * turn) if self.config.rotations else 0
        factor = image.shape[2] // latent.shape[2]
        shape = [_scaled(side, scale) for side in latent.shape[2:]]
        return _transformed(image, [factor * side for side in shape], turns), _transformed(latent, shape, turns)


def _scaled(side: int, scale: float) -> int:
    return max(1, math.floor(side * scale + 0.5))


def _transformed(x: Tensor, shape: list[int], turns: int) -> Tensor:
    """Resize ``x [b c h w]`` to ``shape``, then rotate it by ``turns`` times 90 degrees."""
    if list(x.shape[2:]) != shape:
        x = F.interpolate(x, shape, mode="bilinear", antialias=True)
    return torch.rot90(x, turns, (2, 3))
