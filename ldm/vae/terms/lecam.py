"""LeCam regularization of the discriminator, for few images (Tseng et al. 2021, arXiv 2104.03310)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.nn.ranks import mean_over_ranks
from ldm.vae.terms.term import LossTerm, LossTermConfig


@dataclass(frozen=True)
class LeCamConfig(LossTermConfig, kind="lecam"):
    """Squared distance of the discriminator's logits to moving averages of those of the other class (Tseng et al. 2021)."""

    regularizes_discriminator: ClassVar[bool] = True

    decay: float = config_field(0.99, "decay of the moving averages of the logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay must be in [0, 1), not {self.decay}.")

    def build(self, image_encoder: nn.Module | None = None) -> LeCam:
        return LeCam(self.decay)


class LeCam(LossTerm):
    """E[(D(x) - a_F)^2] + E[(D(G(z)) - a_R)^2] over real images x and reconstructions G(z) (eq. 3; the code of the authors has
    only the parts in which D(x) is above a_F, and D(G(z)) below a_R).

    ``a_R`` and ``a_F`` are moving averages of the logits of real images and of reconstructions (eq. 4), which the present batch,
    that of all ranks, is part of. They begin with the means of the first batch.
    """

    mean_real: Tensor
    mean_fake: Tensor
    updates: Tensor

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_real", torch.zeros(()))
        self.register_buffer("mean_fake", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def discriminator_loss(self, image: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        real, fake = real.float(), fake.float()
        self._update(real.detach().mean(), fake.detach().mean())
        # Copies, since a later batch changes the buffers in place, possibly before this one is differentiated.
        return (real - self.mean_fake.clone()).square().mean() + (fake - self.mean_real.clone()).square().mean()

    @torch.no_grad()
    def _update(self, real: Tensor, fake: Tensor) -> None:
        weight = torch.where(self.updates > 0, 1 - self.decay, 1.0)
        for average, value in ((self.mean_real, real), (self.mean_fake, fake)):
            average.lerp_(mean_over_ranks(value), weight)
        self.updates += 1
