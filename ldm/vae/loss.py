"""Losses of stage 1 (Rombach et al. 2022, arXiv 2112.10752, appendix G; Esser et al. 2021, arXiv 2012.09841)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import Kind, config_field
from ldm.errors import ConfigError, LdmError, missing_extra
from ldm.nn.ranks import mean_over_ranks
from ldm.vae.discriminator import PatchDiscriminator, largest_number_of_layers
from ldm.vae.terms import LossTermConfig

LPIPS_SIDE = 16
"""Least height and width of images for LPIPS, whose VGG halves them four times."""


@dataclass(frozen=True)
class VAELossConfig(Kind, default="reconstruction"):
    """Family of the losses of stage 1: a reconstruction loss, plus KL, adversarial and additional terms that all kinds share.

    ``build()`` makes a module that maps ``image, reconstruction [b c h w]`` in [-1, 1] to the reconstruction loss ``[b]``, summed
    over an image. Its parameters are trained with the first stage.
    """

    kl: float = config_field(
        1e-6, "weight of the KL divergence to the standard normal, or for a VQ of the commitment loss, usually 0.25"
    )
    adversarial: float = config_field(0.0, "weight of the adversarial loss; 0 = no discriminator")
    disc_start: int | float = config_field(
        0,
        "step at which the discriminator and the adversarial loss begin: a whole number such as 5000, or a fraction of "
        "train.max_steps with a decimal point, from 0.0 to 1.0",
    )
    disc_width: int = config_field(64, "channels after the discriminator's first convolution")
    disc_layers: int = config_field(3, "strided convolutions of the discriminator")
    terms: tuple[LossTermConfig, ...] = config_field((), "additional terms, each kind at most once")

    def __post_init__(self) -> None:
        kinds = [term.kind for term in self.terms]
        if len({*kinds}) < len(kinds):
            raise ConfigError(
                f"terms contains {next(each for each in kinds if kinds.count(each) > 1)} twice; remove one."
            )
        if not self.adversarial and (found := [term.kind for term in self.terms if term.regularizes_discriminator]):
            raise ConfigError(
                f"terms contains {found[0]}, which regularizes the discriminator, but adversarial is 0; set it above 0 or remove "
                "the term."
            )
        if min(self.kl, self.adversarial) < 0:
            raise ConfigError("weights must not be negative.")
        if self.disc_width < 1 or self.disc_layers < 1:
            raise ConfigError("disc_width and disc_layers must be at least 1.")
        if self.disc_start < 0 or (isinstance(self.disc_start, float) and not self.disc_start <= 1):
            raise ConfigError(
                f"disc_start is {self.disc_start}; give a step as a whole number without a decimal point, such as 5000, or a "
                "fraction of max_steps from 0.0 to 1.0."
            )

    @property
    def features(self) -> tuple[str, ...]:
        """Modules of the first stage whose outputs the loss takes as the argument ``features``, by their names in it."""
        return ()

    def discriminator_step(self, max_steps: int) -> int:
        """Return the step at which the adversarial loss begins in a training of ``max_steps``."""
        return round(self.disc_start * max_steps) if isinstance(self.disc_start, float) else self.disc_start

    def build(self) -> nn.Module:
        raise NotImplementedError

    def smallest(self, height: int, width: int, factor: int = 1) -> tuple[int, int]:
        """Return the smallest height and width to which the terms scale images."""
        for term in self.terms:
            height, width = term.smallest(height, factor), term.smallest(width, factor)
        return height, width

    def check_size(self, height: int, width: int, factor: int = 1) -> None:
        """Check that discriminator and terms can take images of ``height`` by ``width`` pixels, as the terms scale them.

        Raises:
            ConfigError: they are too small for the number of layers of the discriminator, or for a term.
        """
        height, width = self.smallest(height, width, factor)
        for term in self.terms:
            term.check_size(height, width)
        most = largest_number_of_layers(min(height, width))
        if self.adversarial and self.disc_layers > most:
            instead = f"set it to {most} at most, or adversarial to 0" if most else "set adversarial to 0"
            raise ConfigError(
                f"disc_layers is {self.disc_layers}, which is too many for images of {height} x {width} pixels; {instead}."
            )

    def build_discriminator(self, image_channels: int) -> PatchDiscriminator | None:
        """Build the discriminator of the adversarial loss; None if its weight is 0."""
        return PatchDiscriminator(image_channels, self.disc_width, self.disc_layers) if self.adversarial else None


@dataclass(frozen=True)
class AutoencoderLossConfig(VAELossConfig, kind="reconstruction"):
    """L1, L2 and LPIPS; sums over an image, means over the batch, as in the LDM paper."""

    l1: float = config_field(1.0, "weight of the absolute error")
    l2: float = config_field(0.0, "weight of the squared error")
    lpips: float = config_field(0.0, "weight of the perceptual distance; needs the package lpips and its VGG weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.l1, self.l2, self.lpips) < 0 or self.l1 + self.l2 == 0:
            raise ConfigError("weights must not be negative, and l1 or l2 must be above 0.")

    def check_size(self, height: int, width: int, factor: int = 1) -> None:
        super().check_size(height, width, factor)
        smallest = min(self.smallest(height, width, factor))
        if self.lpips and smallest < LPIPS_SIDE:
            scaled = " that a term has scaled" if smallest < min(height, width) else ""
            raise ConfigError(
                f"lpips cannot be used with images of {smallest} pixels{scaled}, since its network needs {LPIPS_SIDE}; set "
                "it to 0."
            )

    def build(self) -> ReconstructionLoss:
        return ReconstructionLoss(self)


class ReconstructionLoss(nn.Module):
    """Weighted sum of L1, L2 and LPIPS between an image and its reconstruction, each summed over the values of the image.

    Raises:
        MissingExtraError: LPIPS has a weight and the package lpips is not installed.
        LdmError: its VGG weights can neither be found nor downloaded.
    """

    def __init__(self, config: AutoencoderLossConfig):
        super().__init__()
        self.config = config
        self.perceptual = _lpips() if config.lpips else None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()  # it has dropout, which would make the distance random
        return self

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """``image, reconstruction [b c h w]`` in [-1, 1] ``-> [b]``"""
        difference = (image - reconstruction).flatten(1)
        loss = self.config.l1 * difference.abs().sum(1) + self.config.l2 * difference.square().sum(1)
        if self.perceptual is not None:
            # LDM adds the distance of the image to the error of each of its values.
            loss = loss + self.config.lpips * self._distance(image, reconstruction) * difference.shape[1]
        return loss

    def _distance(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the LPIPS of each image in fp32, ``[b]``; fp16 could hold neither its gradient nor its product with a size."""
        assert self.perceptual is not None
        device = image.device.type
        reduced = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.float16
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=reduced):
            distance: Tensor = self.perceptual(image.float(), reconstruction.float())
        return distance.flatten().float()


def _lpips() -> nn.Module:
    try:
        from lpips import LPIPS
    except ImportError:
        raise missing_extra("lpips", "the perceptual loss (vae.loss.lpips above 0)", "lpips") from None
    if torch.empty(0).is_meta:  # to count what it costs, for which no weights are needed
        return LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    try:
        return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except OSError as error:
        raise LdmError(
            f"the VGG weights of the perceptual loss are not on this machine and cannot be downloaded ({error}); "
            "put them into torch's hub folder or set vae.loss.lpips=0."
        ) from None


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of the logits for images and for reconstructions (Lim & Ye 2017, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


class GeneratorLoss(NamedTuple):
    """The adversarial loss of a first stage, for which the discriminator is evaluated and differentiated once.

    Attributes:
        value: minus the mean of the logits, with gradients for the first stage alone.
        logits: output of the discriminator, with gradients for its parameters alone.
    """

    value: Tensor
    logits: Tensor

    @classmethod
    def of(cls, discriminator: nn.Module, reconstruction: Tensor) -> GeneratorLoss:
        """Compute the loss of ``reconstruction [b c h w]``."""
        image = reconstruction.detach().requires_grad_()
        logits = discriminator(image)
        value = -logits.float().mean()
        scale = torch.full_like(value, image.numel())  # fp16 could not hold the gradients of single values of the image
        with torch.autocast(image.device.type, enabled=False):  # as torch recommends for a backward pass
            gradient = torch.autograd.grad(value, image, scale, retain_graph=True)[0].float() / image.numel()
        return cls(_WithGradient.apply(value.detach(), reconstruction, gradient), logits)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to ``x`` is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor, None]:
        return None, (outer * ctx.saved_tensors[0]).to(ctx.dtype), None


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Return the weight that gives both losses gradients of equal norm at the last layer (arXiv 2012.09841, eq. 7).

    ||d reconstruction_loss / d last_layer|| / (||d generator_loss / d last_layer|| + 1e-4), in [0, 1e4]. With several ranks,
    the losses are the means of those of all ranks.
    """
    rec_grad = mean_over_ranks(torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0])
    g_grad = mean_over_ranks(torch.autograd.grad(generator_loss, last_layer, retain_graph=True)[0])
    return (rec_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
