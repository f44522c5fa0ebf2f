"""Edge maps: the outlines of an image, detected in training images or passed to a pipeline as images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import SamplingError
from ldm.image_arguments import as_tensor, mask_of, read_mask
from ldm.image_files import open_image
from ldm.modalities.base import register
from ldm.modalities.pixel_map import PixelMap

LOW, HIGH = 0.1, 0.2
"""Gradient thresholds as fractions of the gradient of a black-white step; about 100 and 200 in OpenCV's units."""


class EdgeMap(PixelMap):
    """An edge map: 0 (no edge) to 1 (edge) for each pixel, stored as a greyscale image, in batches fp32 ``[b h w]``."""

    def decode(self, data: bytes) -> Image.Image:
        """Return an 8-bit greyscale image, white on the edges; what is transparent is no edge."""
        return Image.fromarray((mask_of(open_image(data)) * 255).round().byte().numpy())

    def values(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(pixels.astype(np.float32) / 255)

    def entry(self, value: Any) -> Tensor:
        """Return ``[h w]`` fp32 in [0, 1] from an image, a file, or an array or tensor of that shape and range."""
        if isinstance(value, str | Path):
            return self.values(np.asarray(self.decode_file(value)))
        if isinstance(value, Image.Image):
            return read_mask(value)
        values = as_tensor(f"the {self.noun}", value)
        if values.ndim != 2 or not values.is_floating_point() or values.min() < 0 or values.max() > 1:
            raise SamplingError(
                f"an edge map is an image, or a tensor [h, w] in [0, 1], not {list(values.shape)} of {values.dtype} from "
                f"{values.min().item()} to {values.max().item()}; use detect_edges to make one from an image."
            )
        return values.float()

    def preview(self, values: Tensor, images: Tensor) -> Tensor:
        """Return the edges in white on black."""
        return (2 * values - 1)[:, None].expand_as(images)


def detect_edges(images: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Detect edges as Canny 1986 ("A Computational Approach to Edge Detection") does, without blurring first.

    Sobel gradients, of the channel where they are largest; non-maximum suppression along the nearest of four
    directions; and hysteresis: pixels above ``low`` are edges where they connect to one above ``high``.

    Args:
        images: ``[b c h w]`` in [-1, 1].
        low, high: thresholds as fractions of the gradient of a step from black to white.

    Returns:
        ``[b h w]`` fp32, 1 on the edges, one pixel wide (up to two along diagonals), and 0 elsewhere.
    """
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    dx, dy = (
        (rows[..., 2:] - rows[..., :-2]) / 8,
        (columns[..., 2:, :] - columns[..., :-2, :]) / 8,
    )  # of black to white: 1
    strength, channel = (dx**2 + dy**2).sqrt().max(1, keepdim=True)
    dx, dy = dx.gather(1, channel), dy.gather(1, channel)

    around = F.pad(strength, (1, 1, 1, 1))
    height, width = images.shape[-2:]

    def is_peak(y: int, x: int) -> Tensor:
        """Return where the gradient is at least that of the neighbour at (y, x), and above that of the opposite one."""
        ahead, behind = (around[..., 1 + s * y :, 1 + s * x :][..., :height, :width] for s in (1, -1))
        return (strength >= ahead) & (strength > behind)

    tan = 2**0.5 - 1  # of half the angle between two directions
    falling = torch.where(dx * dy > 0, is_peak(1, 1), is_peak(1, -1))
    peak = torch.where(dy.abs() <= tan * dx.abs(), is_peak(0, 1), falling)
    peak = torch.where(dx.abs() <= tan * dy.abs(), is_peak(1, 0), peak)
    candidates, edges = (peak & (strength > threshold) for threshold in (low, high))
    while True:
        grown = candidates & (F.max_pool2d(edges.float(), 3, 1, 1) > 0)
        if torch.equal(grown, edges):
            return edges[:, 0].float()
        edges = grown


EDGES = register(EdgeMap("edges", "edge map", "edge maps", suffix="edges.png", resampling=Image.Resampling.LANCZOS))
