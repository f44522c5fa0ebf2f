"""R1: penalty on the gradient of the discriminator at real images (Mescheder et al. 2018, arXiv 1801.04406)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.vae.terms.term import LossTerm, LossTermConfig


@dataclass(frozen=True)
class R1Config(LossTermConfig, kind="r1"):
    """Penalty on the gradient of the discriminator at real images, at each step; the weight is gamma (Mescheder et al. 2018)."""

    regularizes_discriminator: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True

    def build(self, image_encoder: nn.Module | None = None) -> R1:
        return R1()


class R1(LossTerm):
    """1/2 E[||grad D(x)||^2] over real images x (eq. 9), where D(x) is the mean of the logits of the patches of an image."""

    def discriminator_loss(self, image: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        output = real.float().flatten(1).mean(1)
        scale = image[0].numel()  # fp16 could not hold the gradients of single values
        outer = torch.full_like(output, scale)
        with torch.autocast(image.device.type, enabled=False):  # as torch recommends for a backward pass
            gradient = torch.autograd.grad(output, image, outer, create_graph=True)[0].float() / scale
            return 0.5 * gradient.square().flatten(1).sum(1).mean()
