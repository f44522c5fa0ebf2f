"""Crops: which part of a stored image becomes a training image, and where its annotations then lie."""

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
    """Scaling of an image so that it covers ``height`` × ``width``, with what sticks out cut off.

    Cutting and scaling are one resampling of the kept part, so neither side is rounded; Lanczos, which averages
    over the source pixels when scaling down.
    """

    height: int
    width: int

    def __call__(self, image: Image.Image, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """RGB image to uint8 ``[height width 3]``; ``y``, ``x`` in [0, 1] place the cut, 0.5 being the centre."""
        return self.resample(image, Image.Resampling.LANCZOS, y, x)

    def resample(self, image: Image.Image, resampling: Image.Resampling, y: float, x: float) -> np.ndarray:
        """``[height width ...]`` of the kept part of an image of any mode."""
        box = self.window(image.width, image.height, y, x)
        return np.array(image.resize((self.width, self.height), resampling, box))

    def window(self, width: int, height: int, y: float = 0.5, x: float = 0.5) -> Window:
        """The kept part of an image of ``width`` × ``height`` pixels."""
        scale = min(height / self.height, width / self.width)
        kept_height, kept_width = scale * self.height, scale * self.width
        top, left = y * (height - kept_height), x * (width - kept_width)
        return left, top, min(left + kept_width, width), min(top + kept_height, height)


@dataclass(frozen=True)
class Crop:
    """How one stored image became a training image.

    Attributes:
        fit: size of the training image.
        y, x: place of the cut, from 0 (top, left) to 1.
        flip: whether the result is mirrored, left to right.
        read_size: gives width and height of the stored image in pixels; called when they are needed.
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
        """Top and left of the cut in the resized original, mirrored where the result is, in pixels of the result."""
        left, top, right, bottom = self.fit.window(*self.original_size, self.y, 1 - self.x if self.flip else self.x)
        return round(top * self.fit.height / (bottom - top)), round(left * self.fit.width / (right - left))

    def __call__(self, image: Image.Image, resampling: Image.Resampling) -> np.ndarray:
        """Applies the crop to an image that shows the same as the stored one, such as a map: ``[height width ...]``."""
        pixels = self.fit.resample(image, resampling, self.y, self.x)
        return pixels[:, ::-1] if self.flip else pixels
