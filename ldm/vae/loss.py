"""The losses of the autoencoder (Rombach et al. 2022, arXiv 2112.10752, appendix G; Esser et al. 2021, arXiv 2012.09841)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError, LdmError, missing_extra
from ldm.vae.first_stage import DiagonalGaussian


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Reconstruction + KL + adversarial loss; sums over an image, means over the batch, as in the LDM paper."""

    l1: float = config_field(1.0, "weight of the absolute error")
    l2: float = config_field(0.0, "weight of the squared error")
    lpips: float = config_field(0.0, "weight of the perceptual distance; needs the package lpips and its VGG weights")
    kl: float = config_field(1e-6, "weight of the KL divergence to the standard normal")
    adversarial: float = config_field(0.0, "weight of the adversarial loss; 0 = there is no discriminator")
    disc_start: int = config_field(0, "step from which the discriminator trains and counts")
    disc_width: int = config_field(64, "channels after the discriminator's first convolution")
    disc_layers: int = config_field(3, "strided convolutions of the discriminator")

    def __post_init__(self) -> None:
        if min(self.l1, self.l2, self.lpips, self.kl, self.adversarial) < 0 or self.l1 + self.l2 == 0:
            raise ConfigError("weights must not be negative, and l1 or l2 must be above 0.")
        if self.disc_width < 1 or self.disc_layers < 1 or self.disc_start < 0:
            raise ConfigError("disc_width and disc_layers must be at least 1, disc_start at least 0.")


class ReconstructionLoss(nn.Module):
    """How far a reconstruction is from its image: l1, l2 and LPIPS, each summed over the image's values.

    Raises:
        MissingExtraError: LPIPS is wanted and the package lpips is absent.
        LdmError: its VGG weights can neither be found nor fetched.
    """

    def __init__(self, config: AutoencoderLossConfig):
        super().__init__()
        self.config = config
        self.perceptual = _lpips() if config.lpips else None

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """``image, reconstruction [b c h w]`` in [-1, 1] ``-> [b]``"""
        difference = (image - reconstruction).flatten(1)
        loss = self.config.l1 * difference.abs().sum(1) + self.config.l2 * difference.square().sum(1)
        if self.perceptual is not None:
            # LDM adds the distance of the image to the error of each of its values.
            loss = loss + self.config.lpips * self.perceptual(image, reconstruction).flatten() * difference.shape[1]
        return loss


def _lpips() -> nn.Module:
    try:
        from lpips import LPIPS
    except ImportError:
        raise missing_extra("lpips", "the perceptual loss (vae.loss.lpips above 0)", "lpips") from None
    try:
        return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except OSError as error:
        raise LdmError(
            f"the VGG weights of the perceptual loss are not on this machine and cannot be fetched ({error}); "
            "put them into torch's hub folder or set vae.loss.lpips=0."
        ) from None


def kl_loss(posterior: DiagonalGaussian) -> Tensor:
    """Mean over the batch of the KL divergence summed over the latent, in nats."""
    return posterior.kl().mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on its logits for images and for reconstructions (Lim & Ye 2017, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """||d reconstruction / d last layer|| / ||d generator / d last layer||: makes both pull alike (arXiv 2012.09841, eq. 7)."""
    wanted = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
    found = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)[0]
    return (wanted.norm() / (found.norm() + 1e-4)).clamp(0.0, 1e4).detach()
