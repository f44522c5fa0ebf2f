"""Image prompts: images whose content conditions the generated image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.image_arguments import signed_image
from ldm.modalities.base import Modality, register


class ImagePrompt(Modality):
    """An image prompt: in training the image itself; passed to a pipeline as an image, file, array or tensor."""

    def entry(self, value: Any) -> Tensor:
        """Return ``[3 h w]`` fp32 in [-1, 1]."""
        return signed_image(value)


IMAGE = register(ImagePrompt("image", "image", "images", ndim=3))
