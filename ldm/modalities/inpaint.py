"""Masked images for inpainting: a mask and the known part of an image."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ldm.errors import SamplingError
from ldm.image_arguments import as_tensor
from ldm.modalities.base import Modality, register


class MaskedImage(Modality):
    """A mask (1 where the image is generated) and the latents of the known part, ``[1 + c h w]``, made by the conditioner."""

    def entry(self, value: Any) -> Tensor:
        """Return ``[1 + c h w]`` fp32; the conditioner checks the shape."""
        tensor = as_tensor(self.key, value).float()
        if not tensor.isfinite().all():
            raise SamplingError(f"{self.key} holds NaN or infinite values; give a mask in [0, 1] and finite latents.")
        return tensor

    def preview(self, values: Tensor, images: Tensor) -> Tensor:
        """Return the images with the masked area in grey."""
        return images * (1 - F.interpolate(values[:, :1], images.shape[-2:]))


INPAINT = register(MaskedImage("inpaint", "masked image", "masked images", ndim=3))
