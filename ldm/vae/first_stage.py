"""Interface of a first stage: images to latents and back, and the statistics that normalise latents for the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.config import Kind, config_field
from ldm.vae.posterior import DiagonalGaussian, Posterior


class FirstStageConfig(Kind):
    """Family of first-stage configs; ``build()`` makes the :class:`FirstStage`."""

    latent_channels: int
    image_channels: int
    has_weights: ClassVar[bool] = True
    """If False, there is nothing to train or load: stage 3 does not need a trained first stage."""

    @property
    def factor(self) -> int:
        """Pixels for each latent position, along each side."""
        raise NotImplementedError

    def build(self) -> FirstStage:
        raise NotImplementedError


class FirstStage(nn.Module):
    """Network that maps images ``[b c h w]`` in [-1, 1] to a posterior over latents ``[b z h/f w/f]``, and latents to images.

    A subclass implements ``encode`` and ``decode``, and names the class of its posteriors in ``posterior_type`` if they are not
    Gaussian. It may implement :class:`HasLastLayer`, :class:`HasPreview` or :class:`ldm.vae.tiling.Tileable`.

    ``latent_mean`` and ``latent_std``, ``[z]``, are measured at the end of training and saved with the weights, and so is
    ``latent_preview``, ``[c z + 1]``: the map from normalised latents to colours, its last column the bias (see
    :mod:`ldm.vae.preview`). A file may lack ``latent_preview``.
    """

    posterior_type: ClassVar[type[Posterior]] = DiagonalGaussian
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
        self.fitted_preview: Tensor | None = None  # used if a file lacks latent_preview; not saved
        self.register_load_state_dict_pre_hook(_prepare_preview)

    def encode(self, image: Tensor) -> Posterior:
        """Return the posterior over ``[b z h/f w/f]`` of ``image [b c h w]`` in [-1, 1], with sides divisible by the factor."""
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        """Decode ``latent [b z h w]`` (not normalised) to images ``[b c fh fw]``, approximately in [-1, 1] (not clamped)."""
        raise NotImplementedError

    def update(self, posterior: Posterior) -> None:
        """Update state learned without gradients from the posterior of a training batch, after its losses are computed."""

    @property
    def encoding_modules(self) -> Sequence[nn.Module]:
        """Modules whose parameters determine the latents of an image."""
        return ()

    @property
    def called_modules(self) -> Sequence[nn.Module]:
        """Modules that a training step calls; see :attr:`ldm.training.tasks.task.Task.called_modules`."""
        return ()

    def posterior(self, batch: Mapping[str, Any]) -> Posterior:
        """Return the posterior of a batch, from its cached latents if it has them, else by encoding its ``image``."""
        names = self.posterior_type.cached
        if all(name in batch for name in names):
            return self.posterior_type.from_cache({name: batch[name] for name in names})
        return self.encode(batch["image"])

    def normalize(self, latent: Tensor) -> Tensor:
        """Normalize latents to zero mean and unit variance in each channel, as the denoiser expects them."""
        return (latent - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, latent: Tensor) -> Tensor:
        """Invert :meth:`normalize`."""
        return latent * self.latent_std[:, None, None] + self.latent_mean[:, None, None]


@runtime_checkable
class HasLastLayer(Protocol):
    """A first stage that can be trained with the adversarial loss."""

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight; the gradients at it balance the adversarial loss against the reconstruction loss."""


@runtime_checkable
class HasPreview(Protocol):
    """A first stage that has its own preview method instead of a fitted map."""

    def preview(self, latent: Tensor) -> Tensor:
        """Return a cheap estimate ``[b c h w]`` of the images of normalised latents ``[b z h w]``, approximately in [-1, 1]."""


@dataclass(frozen=True)
class IdentityConfig(FirstStageConfig, kind="identity"):
    """No first stage: the denoiser works on the data itself (DDPM in pixel space, the two-dimensional toys)."""

    has_weights = False

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
    """First stage whose latents are the images, without noise."""

    def encode(self, image: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(image, torch.full_like(image, -30.0))

    def decode(self, latent: Tensor) -> Tensor:
        return latent

    def preview(self, latent: Tensor) -> Tensor:
        return latent


def _prepare_preview(stage: FirstStage, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Register ``latent_preview`` if the state to be loaded has it, else remove it."""
    preview = state.get(f"{prefix}latent_preview")
    empty = None if preview is None else torch.empty_like(preview, device=stage.latent_mean.device)
    stage.register_buffer("latent_preview", empty)
    stage.fitted_preview = None
