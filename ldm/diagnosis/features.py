"""Statistics of images that noise, fog, saturation and missing contrast change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reference(NamedTuple):
    """Mean and standard deviation of the features of real images, ``[k]`` each."""

    mean: Tensor
    std: Tensor


def features(images: Tensor) -> Tensor:
    """Return the features of images ``[n c h w]`` in [-1, 1]: ``[n k]``.

    Mean of each channel, contrast (standard deviation), difference of neighbouring pixels (noise raises, fog lowers it), and
    share of saturated values.
    """
    x = images.double().clamp(-1, 1)
    vertical = (x[:, :, 1:] - x[:, :, :-1]).abs().flatten(1).mean(1)
    horizontal = (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().flatten(1).mean(1)
    columns = [x.mean((2, 3)), x.flatten(1).std(1)[:, None], (vertical + horizontal)[:, None]]
    return torch.cat([*columns, (x.abs() > 0.98).double().flatten(1).mean(1)[:, None]], dim=1)


def reference(images: Tensor) -> Reference:
    """Measure real images, ``[n c h w]`` in [-1, 1]."""
    values = features(images)
    return Reference(values.mean(0), values.std(0).clamp(min=0.02))


def distance(images: Tensor, real: Reference) -> Tensor:
    """Return how far each image is from real ones, ``[n]``: the mean squared deviation, 1 on average for real images."""
    return ((features(images) - real.mean) / real.std).square().mean(1)
