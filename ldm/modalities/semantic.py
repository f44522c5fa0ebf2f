"""Semantic maps: a class number for each pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import DataError, SamplingError
from ldm.image_arguments import as_tensor
from ldm.image_files import open_image
from ldm.modalities.base import register
from ldm.modalities.pixel_map import PixelMap


class SemanticMap(PixelMap):
    """A semantic map: stored as a greyscale or palette image, in batches int64 ``[b h w]``."""

    def decode(self, data: bytes) -> Image.Image:
        """Return an image of one channel whose values are class numbers; its palette is not applied."""
        labels = open_image(data, noun="a map")
        if len(labels.getbands()) != 1:
            raise DataError("is not a semantic map: it has several channels; save it in greyscale or with a palette")
        return labels

    def values(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(pixels.astype(np.int64))

    def entry(self, value: Any) -> Tensor:
        """Return ``[h w]`` int64 from a file, an image of one channel, an array, a tensor or a list of rows."""
        value = self.decode_file(value) if isinstance(value, str | Path) else value
        values = as_tensor(f"the {self.noun}", np.asarray(value) if isinstance(value, Image.Image) else value).cpu()
        if values.ndim != 2 or values.is_floating_point():
            raise SamplingError(
                f"a semantic map is [h w] of integers, not {list(values.shape)} of {str(values.dtype).removeprefix('torch.')}; "
                "give one class number for each pixel."
            )
        return values.long()


SEMANTIC = register(SemanticMap("semantic", "semantic map", "semantic maps", suffix="semantic.png"))
