"""What a first stage is: images to latents and back, with the statistics by which the denoiser sees them normalised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import Kind, config_field
from ldm.vae.preview import LeastSquares


class DiagonalGaussian:
    """N(mean, diag(exp(logvar))), the posterior over the latents of an image.

    Args:
        mean: ``[b c h w]``.
        logvar: the same shape; clamped to [-30, 20] so that neither it nor its exponential overflows.
    """

    def __init__(self, mean: Tensor, logvar: Tensor):
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal ``noise`` of the mean's shape."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(self || N(0, 1)) in nats, summed over an image: ``[b]`` (Kingma & Welling 2013, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class FirstStageConfig(Kind):
    """The family of first stages; ``build()`` gives a :class:`FirstStage`."""

    latent_channels: int
    image_channels: int

    @property
    def factor(self) -> int:
        """Pixels a latent position, along each side."""
        raise NotImplementedError

    def build(self) -> FirstStage:
        raise NotImplementedError


class FirstStage(nn.Module):
    """Pictures ``[b c h w]`` in [-1, 1] to a posterior over latents ``[b z h/f w/f]``, and latents to images.

    ``latent_mean`` and ``latent_std``, ``[z]``, are measured at the end of training and saved with the weights, and so is
    ``latent_preview``, ``[c z + 1]``: the map, its bias last, from normalised latents to colours. A file may lack that one;
    it is then fitted when first needed, and not saved.
    """

    latent_mean: Tensor
    latent_std: Tensor
    latent_preview: Tensor | None

    def __init__(self, latent_channels: int, factor: int):
        super().__init__()
        self.latent_channels = latent_channels
        self.factor = factor
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))
        self.register_buffer("latent_preview", None)
        self.register_load_state_dict_pre_hook(_make_room_for_preview)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """``image [b c h w]`` in [-1, 1], sides divisible by the factor, to the posterior over ``[b z h/f w/f]``."""
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        """``latent [b z h w]`` (not normalised) to images ``[b c fh fw]``, about in [-1, 1] (not clamped)."""
        raise NotImplementedError

    # For tiling, each of the two in a part that works at the resolution of the latents and one that works at finer ones

    def coarse_decode(self, latent: Tensor) -> Tensor:
        """The first part of :meth:`decode`: ``[b z h w] -> [b e h w]``."""
        return latent

    def fine_decode(self, features: Tensor) -> Tensor:
        """The rest of it: ``[b e h w] -> [b c fh fw]``."""
        return self.decode(features)

    def fine_encode(self, image: Tensor) -> Tensor:
        """The first part of :meth:`encode`: ``[b c fh fw] -> [b e h w]``."""
        posterior = self.encode(image)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def coarse_encode(self, features: Tensor) -> DiagonalGaussian:
        """The rest of it: ``[b e h w]`` to the posterior over ``[b z h w]``."""
        return DiagonalGaussian(*features.chunk(2, dim=1))

    @property
    def last_layer(self) -> Tensor:
        """The weight by whose gradients the adversarial loss is balanced against the reconstruction."""
        raise NotImplementedError

    def compile_networks(self) -> None:
        """torch.compile, in place, what a training step calls; nothing where there is no network."""

    def normalize(self, latent: Tensor) -> Tensor:
        """To zero mean and unit variance a channel, as the denoiser sees latents."""
        return (latent - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, latent: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return latent * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    def preview(self, latent: Tensor) -> Tensor:
        """A cheap estimate of the image of normalised latents ``[b z h w]``, a pixel each: ``[b c h w]``, about in [-1, 1]."""
        if self.latent_preview is None:
            self.register_buffer("latent_preview", self._fit_preview(), persistent=False)
        assert self.latent_preview is not None
        weight, bias = self.latent_preview[:, :-1], self.latent_preview[:, -1]
        return F.conv2d(latent.float(), weight[..., None, None], bias)

    @torch.no_grad()
    def _fit_preview(self) -> Tensor:
        """The map for what the decoder makes of smooth random latents: nearer to images than of white noise."""
        fit, generator = LeastSquares(), torch.Generator().manual_seed(0)
        for _ in range(4):
            noise = torch.randn(16, self.latent_channels, 2, 2, generator=generator).to(self.latent_mean)
            latent = F.interpolate(noise, size=(8, 8), mode="bilinear")
            z = self.denormalize(latent).to(next(self.parameters()).dtype)
            fit.add(latent, self.decode(z).clamp(-1, 1))
        weight, bias = fit.solve()
        return torch.cat([weight, bias[:, None]], dim=1).to(self.latent_mean)


@dataclass(frozen=True)
class IdentityConfig(FirstStageConfig, kind="identity"):
    """No first stage: the denoiser works on the data itself (DDPM in pixel space, the two-dimensional toys)."""

    image_channels: int = config_field(3, "channels of the image")

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return self.image_channels

    @property
    def factor(self) -> int:
        return 1

    def build(self) -> Identity:
        return Identity(self.image_channels, 1)


class Identity(FirstStage):
    """The image is its own latent, without noise."""

    def encode(self, image: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(image, torch.full_like(image, -30.0))

    def decode(self, latent: Tensor) -> Tensor:
        return latent

    def preview(self, latent: Tensor) -> Tensor:
        return latent


def _make_room_for_preview(stage: FirstStage, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Whether there is a preview is for the file to say that is about to be loaded."""
    preview = state.get(f"{prefix}latent_preview")
    room = None if preview is None else torch.empty_like(preview, device=stage.latent_mean.device)
    stage.register_buffer("latent_preview", room)
