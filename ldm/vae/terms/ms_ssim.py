"""Multi-scale structural similarity (Wang, Simoncelli & Bovik 2003, "Multi-scale structural similarity for image quality")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.vae.terms.term import LossTerm, LossTermConfig

EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, the finest first (section 3.2 of the paper)."""

WINDOW, DEVIATION = 11, 1.5
"""Width of the Gaussian window and its standard deviation, in pixels."""

STABILIZERS = (0.01**2, 0.03**2)
"""(K1 L)^2 and (K2 L)^2 for K1 = 0.01, K2 = 0.03 and the range L = 1 of the values."""

SMALLEST = 1e-6
"""Least value of the factor of a scale; the derivative of its power is infinite at 0."""


@dataclass(frozen=True)
class MSSSIMConfig(LossTermConfig, kind="ms_ssim"):
    """1 - MS-SSIM, in [0, 1] (Wang et al. 2003)."""

    scales: int = config_field(
        5,
        "scales, each half as large as the one before; with fewer than 5 the exponents of the paper are scaled to a sum of 1",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.scales <= len(EXPONENTS):
            raise ConfigError(f"scales must be from 1 to {len(EXPONENTS)}, not {self.scales}.")

    def check_size(self, height: int, width: int) -> None:
        least = WINDOW * 2 ** (self.scales - 1)
        if min(height, width) < least:
            most = (min(height, width) // WINDOW).bit_length()
            instead = f"set scales to {most} at most" if most else "remove the term"
            raise ConfigError(
                f"terms: ms_ssim with {self.scales} scales needs images of at least {least} pixels, but they have {height} x "
                f"{width}; {instead}."
            )

    def build(self, image_encoder: nn.Module | None = None) -> MSSSIM:
        return MSSSIM(self.scales)


class MSSSIM(LossTerm):
    """1 - MS-SSIM of images in [-1, 1]."""

    def __init__(self, scales: int):
        super().__init__()
        self.exponents = [each / sum(EXPONENTS[:scales]) for each in EXPONENTS[:scales]]

    def distance(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):  # variances are differences of squares
            return 1 - ms_ssim((image.float() + 1) / 2, (reconstruction.float() + 1) / 2, self.exponents)


def ms_ssim(x: Tensor, y: Tensor, exponents: list[float]) -> Tensor:
    """Return the MS-SSIM ``[b]`` of ``x, y [b c h w]`` in [0, 1] (eq. 7).

    Luminance compares the ratio of means, so it is defined for values from 0 on only.

    It is the product, over the scales, of the mean of contrast and structure to the power of the exponent of the scale; at the
    coarsest scale also of the luminance. As in torchmetrics, that scale alone is extended at its borders, by reflection.
    """
    product, border = x.new_ones(len(x)), [WINDOW // 2] * 4
    for exponent in exponents[:-1]:
        product = product * _power(_similarities(x, y)[1], exponent)
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    luminance, contrast_structure = _similarities(*(F.pad(each, border, mode="reflect") for each in (x, y)))
    return product * _power(luminance * contrast_structure, exponents[-1])


def _power(values: Tensor, exponent: float) -> Tensor:
    """Return the mean of ``values [b c h w]`` of each image to the power of ``exponent``."""
    return values.flatten(1).mean(1).clamp(min=SMALLEST) ** exponent


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return luminance, and contrast times structure, at each position of the window, ``[b c h-10 w-10]`` each."""
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x.square(), _blurred(y * y) - mean_y.square()
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + STABILIZERS[0]) / (mean_x.square() + mean_y.square() + STABILIZERS[0])
    return luminance, (2 * covariance + STABILIZERS[1]) / (variance_x + variance_y + STABILIZERS[1])


def _blurred(x: Tensor) -> Tensor:
    """Return the means of ``x [b c h w]`` under the window, ``[b c h-10 w-10]``."""
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - (WINDOW - 1) / 2
    window = torch.exp(-places.square() / (2 * DEVIATION**2))
    window, channels = window / window.sum(), x.shape[1]
    x = F.conv2d(x, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
