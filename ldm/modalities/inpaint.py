"""Masks with the known part of an image, to be filled in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ldm.modalities.base import Modality, register


class MaskedImage(Modality):
    """A mask (1 where the image is to be made) and the latents of the known part, ``[1 + c h w]``, made by the conditioner."""

    def preview(self, values: Tensor, images: Tensor) -> Tensor:
        """The images with what is masked in grey."""
        return images * (1 - F.interpolate(values[:, :1], images.shape[-2:]))


INPAINT = register(MaskedImage("inpaint", "masked image", "masked images", ndim=3))
