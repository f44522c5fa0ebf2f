"""Aspect buckets: shapes of about equal area, to one of which each image is resized and cropped.

Images then keep most of their content, and all images of a batch have one shape. The shapes are those of NovelAI's aspect ratio
bucketing, and nearly those of SDXL (Podell et al. 2023, arXiv 2307.01952, appendix I): sides are multiples of a step, and no
shape has more pixels than ``data.size``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ldm.config import config_field
from ldm.data.shards import Shards
from ldm.errors import ConfigError, DataError, StorageError

MOST = 256
"""Largest number of shapes."""

_FEW = 1000  # images whose headers are read in a moment

Shape = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class BucketConfig:
    """Shapes of training images, for images of different aspect ratios."""

    step: int = config_field(
        64, "Number of pixels of which each side is a multiple; itself a multiple of the downsampling of VAE and U-Net."
    )
    max_aspect: float = config_field(
        2.0, "Largest ratio of the sides of a shape; images that are longer are cropped to it."
    )
    shapes: tuple[tuple[int, int], ...] | None = config_field(
        None,
        "Shapes as a list of [height, width] in pixels, instead of those that follow from data.size, step and max_aspect.",
        omit_default=True,
    )

    def __post_init__(self) -> None:
        if self.shapes is not None:
            self._check_shapes(self.shapes)
        if self.step < 1:
            raise ConfigError(f"step must be at least 1, not {self.step}.")
        if not 1 < self.max_aspect < math.inf:
            raise ConfigError(f"max_aspect must be greater than 1, not {self.max_aspect}.")

    def table(self, height: int, width: int) -> list[Shape]:
        """Return the shapes in ascending order of width / height: those that are given, or else derived ones.

        These have at most ``height * width`` pixels. For each side there is the longest other one, and of shapes of equal aspect
        ratio, the largest is used.

        Raises:
            ConfigError: ``height`` or ``width`` is not a multiple of the step, so that the size itself is not a shape; or there
                are too many shapes.
        """
        if self.shapes is not None:
            return sorted(self.shapes, key=_aspect)
        step = self.step
        if height % step or width % step:
            raise ConfigError(
                f"size is {height} x {width}, whose sides are not multiples of buckets.step, which is {step}; change one of them."
            )
        found = {(height, width)}
        for side in range(step, height * width // step + 1, step):
            other = height * width // side // step * step
            if max(side, other) <= self.max_aspect * min(side, other):
                found |= {(side, other), (other, side)}
        ascending = sorted(found, key=math.prod)
        by_aspect = {_aspect(shape): shape for shape in ascending}
        if len(by_aspect) > MOST:
            raise ConfigError(
                f"buckets.step is {step}, which gives {len(by_aspect)} shapes, more than {MOST}; raise it."
            )
        return [by_aspect[aspect] for aspect in sorted(by_aspect)]

    def _check_shapes(self, shapes: Sequence[Shape]) -> None:
        """Raise a ConfigError if these cannot be the shapes of the buckets."""
        if not 0 < len(shapes) <= MOST:
            raise ConfigError(f"shapes lists {len(shapes)} shapes; give from 1 to {MOST}.")
        if min(map(min, shapes)) < 1:
            raise ConfigError(f"shapes is {[list(shape) for shape in shapes]}; the sides must be at least 1 pixel.")
        by_aspect: dict[Fraction, Shape] = {}
        for shape in shapes:
            other = by_aspect.setdefault(_aspect(shape), shape)
            if other is not shape:
                raise ConfigError(
                    f"shapes lists {list(other)} and {list(shape)}, which have the same aspect ratio, so that one of them would "
                    "get no images; leave one out."
                )
        if (self.step, self.max_aspect) != (BucketConfig.step, BucketConfig.max_aspect):
            raise ConfigError("step and max_aspect have no effect on shapes that are given; leave them out, or shapes.")


def _aspect(shape: Shape) -> Fraction:
    """Return width / height."""
    return Fraction(shape[1], shape[0])


@dataclass(frozen=True)
class Buckets:
    """Shapes of a set, in ascending order of width / height, and the number of the shape of each sample, uint8 ``[n]``."""

    shapes: Sequence[Shape]
    of: np.ndarray

    def members(self, number: int) -> np.ndarray:
        """Return the numbers of the samples of a shape, in ascending order."""
        return np.flatnonzero(self.of == number)

    def counts(self) -> list[int]:
        """Return the number of samples of each shape."""
        return np.bincount(self.of, minlength=len(self.shapes)).tolist()


def nearest(shapes: Sequence[Shape], width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Return the number of the shape with the nearest aspect ratio, in its logarithm, for images of these sides; uint8 ``[n]``.

    Args:
        shapes: in ascending order of width / height.
        width, height: ``[n]`` in pixels.
    """
    aspects = np.array([across / down for down, across in shapes])
    between = np.sqrt(aspects[1:] * aspects[:-1])  # division and square root are the same to the bit on all machines
    return np.searchsorted(between, width / height).astype(np.uint8)


def image_sizes(shards: Shards, read: Callable[[int], tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return width and height of all images in pixels, int64 ``[n]``; 0 of those that are broken.

    Args:
        shards: the images.
        read: reads width and height of an image of which no index has them, by its number.
    """
    from tqdm import tqdm

    width, height = (_column(shards, name) for name in ("width", "height"))
    missing = np.flatnonzero(width == 0).tolist()
    for i in tqdm(
        missing, "reading sizes (an index would hold them)", unit="image", leave=False, disable=len(missing) < _FEW
    ):
        try:
            width[i], height[i] = read(i)
        except StorageError:
            raise
        except DataError:  # counted as bad when it is drawn
            continue
    return width, height


def _column(shards: Shards, name: str) -> np.ndarray:
    """Return a column of the index with 0 for what is not known."""
    if name not in shards.columns:
        return np.zeros(len(shards), np.int64)
    return np.array(shards.column(name).fill_null(0), np.int64)
