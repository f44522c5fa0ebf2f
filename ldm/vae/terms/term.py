"""Interface of an additional term of the loss of stage 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ldm.config import Kind, config_field
from ldm.errors import ConfigError

if TYPE_CHECKING:
    from ldm.vae.first_stage import FirstStageConfig


@dataclass(frozen=True)
class LossTermConfig(Kind):
    """Family of additional terms of the loss of stage 1; each kind may occur once in ``vae.loss.terms``.

    Class attributes: ``regularizes_discriminator``, whether the term is part of the discriminator's loss; ``needs_gradients``,
    whether it needs the gradients of the discriminator's output with respect to the image; ``trains_encoder``, whether it has an
    effect on the encoder alone.
    """

    regularizes_discriminator: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    trains_encoder: ClassVar[bool] = False

    weight: float = config_field(1.0, "weight of the term")

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"weight is {self.weight}; give a finite number above 0, or remove the term.")

    @property
    def image_encoder(self) -> str | None:
        """Source of the CLIP whose image tower the term uses; None if it uses none."""
        return None

    def build(self, image_encoder: nn.Module | None = None) -> LossTerm:
        """Build the module of the term, with the frozen image tower of :attr:`image_encoder`, if it names one."""
        raise NotImplementedError

    def check_model(self, model: FirstStageConfig) -> None:
        """Check that a first stage can be trained with the term.

        Raises:
            ConfigError: it cannot.
        """

    def check_size(self, height: int, width: int) -> None:
        """Check that images of ``height`` by ``width`` pixels can be compared.

        Raises:
            ConfigError: they cannot.
        """

    def smallest(self, side: int, factor: int) -> int:
        """Return the shortest side of the images that are compared, given the side of those of the data and the VAE's factor."""
        return side


class LossTerm(nn.Module):
    """Additional term of the loss of stage 1; a subclass overrides the methods of those parts of the loss that it changes."""

    def transform(self, image: Tensor, latent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the image ``[b c h w]`` to compare, and the latent ``[b z h/f w/f]`` that is decoded for it."""
        return image, latent

    def distance(self, image: Tensor, reconstruction: Tensor) -> Tensor | None:
        """Return the distance ``[b]`` of ``image, reconstruction [b c h w]`` in [-1, 1], fp32; None if the term is not one."""
        return None

    def discriminator_loss(self, image: Tensor, real: Tensor, fake: Tensor) -> Tensor | None:
        """Return the regularization of the discriminator, a scalar; None if the term is not one.

        Args:
            image: real images ``[b c h w]``; ``real`` can be differentiated with respect to them if ``needs_gradients``.
            real, fake: logits ``[b 1 h' w']`` of these images and of reconstructions.
        """
        return None
