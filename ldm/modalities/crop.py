"""Fitting of stored images to the size of training images, and the positions of annotations in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

Window = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


Color = tuple[int, int, int]
"""Red, green and blue, from 0 to 255."""

WHITE: Color = (255, 255, 255)


@dataclass(frozen=True)
class Fit:
    """Resizing of an image to cover ``height`` × ``width``, with the excess cropped.

    Cropping and resizing are one resampling of the kept part, so neither side is rounded; with the Lanczos filter, which
    averages over the source pixels when downsampling. Subclasses fit in other ways: they override :meth:`window`.

    Attributes:
        height, width: size of the result.
        color: colour of what the window shows outside of the image.
    """

    height: int
    width: int
    color: Color = WHITE

    def __call__(self, image: Image.Image, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """Convert an RGB image to uint8 ``[height width 3]``; ``y``, ``x`` in [0, 1] position the crop, 0.5 is the centre."""
        return self.resample(image, Image.Resampling.LANCZOS, y, x, self.color)

    def resample(
        self, image: Image.Image, resampling: Image.Resampling, y: float, x: float, outside: int | Color = 0
    ) -> np.ndarray:
        """Resample the window of an image of any mode to ``[height width ...]``, with the value ``outside`` around the image."""
        left, top, right, bottom = self.window(image.width, image.height, y, x)
        box = max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height)
        columns = [round((edge - left) / (right - left) * self.width) for edge in box[::2]]
        rows = [round((edge - top) / (bottom - top) * self.height) for edge in box[1::2]]
        inside = np.array(image.resize((columns[1] - columns[0], rows[1] - rows[0]), resampling, box))
        if inside.shape[:2] == (self.height, self.width):
            return inside
        pixels = np.empty((self.height, self.width, *inside.shape[2:]), inside.dtype)
        pixels[:] = outside
        pixels[slice(*rows), slice(*columns)] = inside
        return pixels

    def window(self, width: int, height: int, y: float = 0.5, x: float = 0.5) -> Window:
        """Return the part of an image of ``width`` × ``height`` pixels that the result shows."""
        scale = min(height / self.height, width / self.width)
        kept_height, kept_width = scale * self.height, scale * self.width
        top, left = y * (height - kept_height), x * (width - kept_width)
        return left, top, min(left + kept_width, width), min(top + kept_height, height)


class Pad(Fit):
    """Resizing of an image to fit into ``height`` × ``width``, with borders of :attr:`color`."""

    def window(self, width: int, height: int, y: float = 0.5, x: float = 0.5) -> Window:
        """Return a part that is larger than the image, whose sides are whole pixels in the result."""
        scale = max(height / self.height, width / self.width)
        rows, columns = max(1, round(height / scale)), max(1, round(width / scale))
        top, left = round(y * (self.height - rows)), round(x * (self.width - columns))
        row, column = height / rows, width / columns  # height and width of a pixel of the result
        return -left * column, -top * row, (self.width - left) * column, (self.height - top) * row


class Stretch(Fit):
    """Resizing of an image to ``height`` × ``width``, whatever its aspect ratio is."""

    def window(self, width: int, height: int, y: float = 0.5, x: float = 0.5) -> Window:
        """Return the complete image."""
        return 0.0, 0.0, width, height


FITS: dict[str, type[Fit]] = {"crop": Fit, "pad": Pad, "stretch": Stretch}
"""Ways to fit an image into another aspect ratio, by their names in ``data.fit``."""


@dataclass(frozen=True)
class Crop:
    """Crop or borders, scale and flip by which a stored image became a training image.

    Attributes:
        fit: size of the training image, and how it is reached.
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
        """The part of the stored image that is shown; larger than the image if there are borders."""
        return self.fit.window(*self.original_size, self.y, self.x)

    @property
    def top_left(self) -> tuple[int, int]:
        """Top and left of the crop in the resized original (mirrored if ``flip``), in pixels of the result; 0 with borders."""
        left, top, right, bottom = self.fit.window(*self.original_size, self.y, 1 - self.x if self.flip else self.x)
        rows, columns = top * self.fit.height / (bottom - top), left * self.fit.width / (right - left)
        return max(0, round(rows)), max(0, round(columns))

    def __call__(self, image: Image.Image, resampling: Image.Resampling) -> np.ndarray:
        """Apply the crop to an image aligned with the stored one, such as a map; return ``[height width ...]``, 0 in borders."""
        pixels = self.fit.resample(image, resampling, self.y, self.x)
        return pixels[:, ::-1] if self.flip else pixels
