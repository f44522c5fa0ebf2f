"""Toy data sets of scikit-learn: points of an S-shaped curve, and handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ldm.config import config_field
from ldm.data.config import DataConfig
from ldm.data.samples import Samples, TensorsInMemory
from ldm.data.shards import SPLITS
from ldm.errors import ConfigError, DataError, missing_extra, unknown


@dataclass(frozen=True)
class SCurve(DataConfig, kind="s_curve"):
    """Points of scikit-learn's make_s_curve, projected to x and z and divided by 10, as 2 × 1 × 1 images."""

    points: int = config_field(10_000, "Number of points in each split; the splits are sampled independently.")
    noise: float = config_field(0.1, "Standard deviation of the noise on the curve, before the division.")

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ConfigError(f"points must be at least 1, not {self.points}.")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (2, 1, 1)

    def open(self, split: str) -> Samples:
        try:
            from sklearn.datasets import make_s_curve
        except ImportError:
            raise missing_extra("scikit-learn", "data of kind s_curve", "toy") from None
        points, _ = make_s_curve(self.points, noise=self.noise, random_state=_number(split))
        image = torch.from_numpy(points[:, [0, 2]].astype(np.float32) / 10.0)[:, :, None, None]
        return TensorsInMemory(image, [""] * self.points, [f"{split}-{i}" for i in range(self.points)])


@dataclass(frozen=True)
class Digits(DataConfig, kind="digits"):
    """scikit-learn's 1,797 handwritten digits, 1 × 8 × 8, with their class; a tenth is val, a tenth test."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    def open(self, split: str) -> Samples:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise missing_extra("scikit-learn", "data of kind digits", "toy") from None
        digits = load_digits()
        tenth = np.arange(len(digits.target)) % 10
        index = np.flatnonzero(np.select([tenth == 8, tenth == 9], [1, 2], 0) == _number(split))
        image = torch.from_numpy(digits.images[index].astype(np.float32) / 8.0 - 1.0)[:, None]  # 0..16 to [-1, 1]
        label = torch.from_numpy(digits.target[index].astype(np.int64))
        captions = [f"the digit {i}" for i in label.tolist()]
        return TensorsInMemory(image, captions, [f"digit-{i}" for i in index], {"label": label})


def _number(split: str) -> int:
    if split not in SPLITS:
        raise DataError(unknown("split", split, SPLITS))
    return SPLITS.index(split)
