"""Coloured rectangles on a plain background, with captions, labels, boxes and maps: data for the smallest conditional models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ldm.config import config_field
from ldm.data.config import DataConfig
from ldm.data.samples import Samples, TensorsInMemory
from ldm.data.shards import SPLITS
from ldm.data.transforms import to_tensor
from ldm.errors import ConfigError, DataError, unknown
from ldm.modalities.boxes import Box

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
"""RGB of the rectangles by name of the colour; the number of a colour is its class."""

GROUND = 128
"""Grey level of the background."""


@dataclass(frozen=True)
class Shapes(DataConfig, kind="shapes"):
    """Rectangles of different colours on grey that do not overlap; captions such as "a red and a blue rectangle"."""

    samples: int = config_field(2000, "Number of images in each split; the splits are drawn independently.")
    size: int = config_field(16, "Side of an image in pixels.")
    shapes: int = config_field(
        2, "Largest number of rectangles in an image, each of a different one of the four colours."
    )
    seed: int = config_field(0, "Seed of the images; image i of a split depends on it, the split and i alone.")
    cache_latents: bool = config_field(
        False, "Cache of the posteriors of images, encoded once for the denoiser.", changeable=True
    )

    def __post_init__(self) -> None:
        if self.samples < 1 or self.size < 8 or not 1 <= self.shapes <= len(COLOURS):
            raise ConfigError(f"samples must be at least 1, size at least 8, and shapes 1 to {len(COLOURS)}.")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    def open(self, split: str) -> Samples:
        """Draw a split; ``label`` is the first rectangle's class, ``semantic`` 0 in the background and c + 1 in class c."""
        if split not in SPLITS:
            raise DataError(unknown("split", split, SPLITS))
        size = self.size
        keys = [(self.seed, SPLITS.index(split), i) for i in range(self.samples)]
        drawn = [_rectangles(np.random.default_rng(key), size, self.shapes) for key in keys]
        semantic = np.zeros((self.samples, size, size), np.int64)
        for labels, rectangles in zip(semantic, drawn, strict=True):
            for colour, left, top, right, bottom in rectangles:
                labels[top:bottom, left:right] = colour + 1
        palette = np.array([(GROUND,) * 3, *COLOURS.values()], np.uint8)
        boxes: list[list[Box]] = [
            [(colour, x0 / size, y0 / size, x1 / size, y1 / size) for colour, x0, y0, x1, y1 in rectangles]
            for rectangles in drawn
        ]
        return TensorsInMemory(
            to_tensor(palette[semantic]),
            [_caption([list(COLOURS)[colour] for colour, *_ in rectangles]) for rectangles in drawn],
            [f"{split}-{i}" for i in range(self.samples)],
            {
                "label": torch.tensor([rectangles[0][0] for rectangles in drawn]),
                "boxes": boxes,
                "semantic": torch.from_numpy(semantic),
            },
        )


Rectangle = tuple[int, int, int, int, int]
"""Colour, left, top, right and bottom in pixels."""


def _rectangles(generator: np.random.Generator, size: int, most: int) -> list[Rectangle]:
    """Draw 1 to ``most`` rectangles with sides of a quarter to half of the image, repeated until they do not overlap."""
    colours = generator.permutation(len(COLOURS))[: generator.integers(1, most, endpoint=True)].tolist()
    while True:
        sides = generator.integers(size // 4, size // 2, (len(colours), 2), endpoint=True)
        starts = generator.integers(0, size - sides, endpoint=True)
        taken = np.zeros((size, size), int)
        for (x0, y0), (x1, y1) in zip(starts, starts + sides, strict=True):
            taken[y0:y1, x0:x1] += 1
        if taken.max() == 1:
            corners = np.concatenate([starts, starts + sides], axis=1).tolist()
            return [(colour, *each) for colour, each in zip(colours, corners, strict=True)]


def _caption(names: list[str]) -> str:
    """Return a caption such as "a red, a green and a blue rectangle"."""
    *others, last = (f"a {name}" for name in names)
    return f"{', '.join(others)} and {last} rectangle" if others else f"{last} rectangle"
