"""Wavelet loss: error of the details of an image at several scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.vae.terms.term import LossTerm, LossTermConfig


@dataclass(frozen=True)
class WaveletConfig(LossTermConfig, kind="wavelet"):
    """Absolute error of the Haar wavelet coefficients, without the coarsest average (Sadat et al. 2024, arXiv 2405.14477)."""

    levels: int = config_field(1, "levels of the decomposition; level k compares details of 2^k pixels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 1:
            raise ConfigError(f"levels must be at least 1, not {self.levels}.")

    def check_size(self, height: int, width: int) -> None:
        if min(height, width) < 2**self.levels:
            raise ConfigError(
                f"terms: wavelet with {self.levels} levels needs images of at least {2**self.levels} pixels, but they have "
                f"{height} x {width}; lower levels."
            )

    def build(self, image_encoder: nn.Module | None = None) -> Wavelet:
        return Wavelet(self.levels)


class Wavelet(LossTerm):
    """Sum of the absolute errors of the details of all levels, divided by the number of values of the image."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def distance(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        average, total = image - reconstruction, image.new_zeros(len(image))  # the transform is linear
        for _ in range(self.levels):
            average, details = haar(average)
            total = total + details.abs().flatten(1).sum(1)
        return total / image[0].numel()


def haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose ``x [b c h w]`` by the orthonormal Haar wavelet (Mallat 1989); the last row or column is repeated if odd.

    Returns:
        Averages ``[b c h/2 w/2]`` and details ``[b 3 c h/2 w/2]``: differences along rows, along columns and along both.
    """
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
    a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    details = torch.stack([a - b + c - d, a + b - c - d, a - b - c + d], dim=1)
    return (a + b + c + d) / 2, details / 2
