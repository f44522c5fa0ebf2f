"""Low-resolution images, the input of super-resolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ldm.image_arguments import signed_image
from ldm.modalities.base import Modality, register


class SmallImage(Modality):
    """A small image: in training computed from the training image by its conditioner, as fp32 ``[b 3 h w]`` in [-1, 1]."""

    def entry(self, value: Any) -> Tensor:
        """Return ``[3 h w]`` fp32 in [-1, 1]."""
        return signed_image(value)

    def preview(self, values: Tensor, images: Tensor) -> Tensor:
        """Return the small images, enlarged by nearest-neighbour interpolation."""
        return F.interpolate(values, images.shape[-2:])


LOW_RES = register(SmallImage("low_res", "small image", "small images", ndim=3))
