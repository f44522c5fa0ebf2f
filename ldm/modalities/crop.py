"""Crops: the part of a stored image that becomes a training image, and the positions of its annotations in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

Window = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Fit:
    """Resizing of an image to cover ``height`` × ``width``, with the excess cropped.

    Cropping and resizing are one resampling of the kept part, so neither side is rounded; with the Lanczos filter, which
    averages over the source pixels when downsampling.
    """

    height: int
    width: int

    def __call__(self, image: Image.Image, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """Convert an RGB image to uint8 ``[height width 3]``; ``y``, ``x`` in [0, 1] position the crop, 0.5 is the centre."""
        return self.resample(image, Image.Resampling.LANCZOS, y, x)

    def resample(self, image: Image.Image, resampling: Image.Resampling, y: float, x: float) -> np.ndarray:
        """Resample the kept part of an image of any mode to ``[height width ...]``."""
        box = self.window(image.width, image.height, y, x)
        return np.array(image.resize((self.width, self.height), resampling, box))

    def window(self, width: int, height: int, y: float = 0.5, x: float = 0.5) -> Window:
        """Return the kept part of an image of ``width`` × ``height`` pixels."""
        scale = min(height / self.height, width / self.width)
        kept_height, kept_width = scale * self.height, scale * self.width
        top, left = y * (height - kept_height), x * (width - kept_width)
        return left, top, min(left + kept_width, width), min(top + kept_height, height)


@dataclass(frozen=True)
class Crop:
    """Crop, scale and flip by which a stored image became a training image.

    Attributes:
        fit: size of the training image.
        y, x: position of the crop, from 0 (top, left) to 1.
        flip: whether the result is mirrored, left to right.
        read_size: returns width and height of the stored image in pixels; called only when they are needed.
    """

    fit: Fit
    y: float
    x: float
    flip: bool
    read_size: Callable[[], tuple[int, int]]

    @cached_property
    def original_size(self) -> tuple[int, int]:
        """Width and height of the stored image in pixels."""
        return self.read_size()

    @property
    def window(self) -> Window:
        """The kept part of the stored image."""
        return self.fit.window(*self.original_size, self.y, self.x)

    @property
    def top_left(self) -> tuple[int, int]:
        """Top and left of the crop in the resized original (mirrored if ``flip``), in pixels of the result."""
        left, top, right, bottom = self.fit.window(*self.original_size, self.y, 1 - self.x if self.flip else self.x)
        return round(top * self.fit.height / (bottom - top)), round(left * self.fit.width / (right - left))

    def __call__(self, image: Image.Image, resampling: Image.Resampling) -> np.ndarray:
        """Apply the crop to an image aligned with the stored one, such as a map; return ``[height width ...]``."""
        pixels = self.fit.resample(image, resampling, self.y, self.x)
        return pixels[:, ::-1] if self.flip else pixels
