"""Masked images for inpainting: a mask and the known part of an image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ldm.modalities.base import Modality, register


class MaskedImage(Modality):
    """A mask (1 where the image is generated) and the latents of the known part, ``[1 + c h w]``, made by the conditioner."""

    def preview(self, values: Tensor, images: Tensor) -> Tensor:
        """Return the images with the masked area in grey."""
        return images * (1 - F.interpolate(values[:, :1], images.shape[-2:]))


INPAINT = register(MaskedImage("inpaint", "masked image", "masked images", ndim=3))
