"""Maps: conditions with a value for each pixel, stored as an image of one channel."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import DataError, SamplingError
from ldm.modalities.base import Modality
from ldm.modalities.crop import Crop
from ldm.paths import expanded


@dataclass(frozen=True)
class PixelMap(Modality):
    """A map ``[h w]``: in batches a tensor ``[b h w]``; subclasses define the meaning of a pixel by ``decode`` and ``values``.

    Attributes:
        resampling: filter that resizes a stored map to the size of its training image.
    """

    spatial: bool = True
    ndim: int | None = 2
    resampling: Image.Resampling = Image.Resampling.NEAREST

    def decode(self, data: bytes) -> Image.Image:
        """Return an image of one channel."""
        raise NotImplementedError

    def values(self, pixels: np.ndarray) -> Tensor:
        """Convert the pixels ``[h w]`` of a decoded file to a map."""
        raise NotImplementedError

    def encode(self, value: Image.Image) -> bytes:
        file = io.BytesIO()
        value.save(file, "PNG")
        return file.getvalue()

    def to_member(self, data: bytes, size: tuple[int, int]) -> bytes:
        """Return the file unchanged if it has the image's size, else raise a DataError."""
        image = self.decode(data)
        if image.size != size:
            raise DataError(f"the map is {image.width} x {image.height}, the image {size[0]} x {size[1]}")
        return data

    def crop(self, value: Image.Image, crop: Crop) -> Tensor:
        return self.values(crop(value, self.resampling))

    def collate(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values))

    def decode_file(self, path: str | Path) -> Image.Image:
        """Decode the image of a file that a caller of a pipeline names.

        Raises:
            SamplingError: it cannot be read.
        """
        try:
            return self.decode(Path(expanded(path)).read_bytes())
        except OSError as error:
            raise SamplingError(f"the {self.noun} {path} cannot be read ({error.strerror}).") from None
        except DataError as error:
            raise SamplingError(f"{path} {error}.") from None
