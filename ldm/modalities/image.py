"""Images whose content another image takes up."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.image_io import signed_tensor
from ldm.modalities.base import Modality, register


class ImagePrompt(Modality):
    """An image to take the content from: in training the image itself, given to a pipeline as an image, file or tensor."""

    def entry(self, value: Any) -> Tensor:
        """``[3 h w]`` fp32 in [-1, 1]."""
        return signed_tensor(value)


IMAGE = register(ImagePrompt("image", "image", "images", ndim=3))
