"""Posterior: the distribution of latents of an image; the interface, and the Gaussian of a VAE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Posterior(ABC):
    """Distribution over the latents ``[b z h w]`` of a batch of images.

    A subclass names in ``cached`` the attributes, each a tensor ``[b z h w]``, that determine it. A latent cache stores these,
    and the batches that are read from the cache hold them under the same names.
    """

    cached: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def mode(self) -> Tensor:
        """The most probable latent ``[b z h w]``, fp32; it is also the mean of the samples."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Variance of the samples at each value of the latent, ``[b z h w]``."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """Return a sample ``[b z h w]``, given standard normal ``noise`` of the same shape."""

    @abstractmethod
    def regularization(self) -> Tensor:
        """Return the loss term ``[b]`` that keeps the latents in a bounded range, summed over each latent."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """Return statistics for :meth:`metrics`, each summed over the images of this batch; the caller adds those of batches."""

    @classmethod
    @abstractmethod
    def metrics(cls, sums: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
        """Return scalars to log, given the added :meth:`sums` of ``images`` images."""

    @classmethod
    @abstractmethod
    def cat(cls, posteriors: Sequence[Self]) -> Self:
        """Return the posterior of the concatenated batches."""

    @classmethod
    @abstractmethod
    def from_cache(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the posterior of a batch that was read from a latent cache, fp32; ``tensors`` has the names in ``cached``.

        It supports the mode, the variance and samples; :meth:`regularization` and :meth:`sums` need not work.
        """

    def to_cache(self) -> Tensor:
        """Return what a latent cache stores: the tensors named in ``cached``, stacked to ``[b n z h w]``."""
        return torch.stack([getattr(self, name) for name in self.cached], dim=1)


class DiagonalGaussian(Posterior):
    """N(mean, diag(exp(logvar))), the posterior of a VAE.

    Args:
        mean: ``[b z h w]``.
        logvar: the same shape; clamped to [-30, 20] so that neither it nor its exponential overflows.
    """

    cached = ("mean", "std")

    def __init__(self, mean: Tensor, logvar: Tensor):
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def mode(self) -> Tensor:
        return self.mean

    @cached_property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Return KL(self || N(0, 1)) in nats, summed over each latent: ``[b]`` (Kingma & Welling 2013, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)

    def regularization(self) -> Tensor:
        """Return :meth:`kl`."""
        return self.kl()

    def sums(self) -> dict[str, Tensor]:
        return {"kl": self.kl().detach().sum()}

    @classmethod
    def metrics(cls, sums: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
        """Return ``kl``, the mean KL divergence of an image's latent, in nats."""
        return {"kl": sums["kl"] / images}

    @classmethod
    def cat(cls, posteriors: Sequence[Self]) -> Self:
        return cls(torch.cat([each.mean for each in posteriors]), torch.cat([each.logvar for each in posteriors]))

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor]) -> Self:
        posterior = cls(tensors["mean"], 2 * tensors["std"].log())
        posterior.std = tensors["std"]  # as it was stored, not as it is rounded by logarithm and exponential
        return posterior
