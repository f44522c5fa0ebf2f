"""First stage with a codebook: each latent position is replaced by the nearest of k vectors (VQ-VAE, arXiv 1711.00937).

The latents are those before quantisation, and the decoder quantises its input, as in latent diffusion's VQ models: the
denoiser then works on continuous latents, and its small errors disappear at the nearest code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.vae.autoencoder import ConvolutionalAutoencoder, ConvolutionalConfig
from ldm.vae.posterior import Posterior

DISTANCES = 1 << 24
"""Largest number of distances between latents and codes in memory at once."""


@dataclass(frozen=True)
class VQConfig(ConvolutionalConfig, kind="vq"):
    """VQ-VAE: convolutional encoder and decoder, and a codebook learned by moving averages; factor = 2 ** (levels - 1)."""

    codes: int = config_field(1024, "vectors in the codebook")
    decay: float = config_field(0.99, "decay of the moving averages by which the codebook learns")
    restart: float = config_field(
        0.1,
        "codes used less than this share of uniform usage are replaced by latents of the batch; 0 = only unused ones",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes < 1 or not 0 <= self.decay < 1 or not 0 <= self.restart < 1:
            raise ConfigError(
                f"codes is {self.codes}, decay {self.decay} and restart {self.restart}; codes must be at least 1, decay and "
                "restart at least 0 and below 1."
            )

    def build(self) -> VQ:
        return VQ(self)


class Codebook(nn.Module):
    """k vectors of width d that follow the vectors assigned to them by exponential moving averages (appendix A.1).

    For the n_i of a batch's vectors whose nearest code is i,

        N_i <- decay N_i + (1 - decay) n_i,    m_i <- decay m_i + (1 - decay) sum of these vectors,    code_i = m_i / N_i.

    A code with ``N_i`` at or below ``restart`` times n / k (its share if all were used equally) is replaced by a vector of the
    batch, as in Jukebox (arXiv 2005.00341, section 3.1), with n / k as its new ``N_i``. The vector is drawn with a probability
    proportional to its squared distance to the nearest code, as in k-means++: a frequent vector already has a code. Since ``N``
    begins at 0, the first batch initialises the codebook.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(self, codes: int, width: int, decay: float, restart: float):
        super().__init__()
        self.decay, self.restart = decay, restart
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, width))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """Return the index of the nearest code by Euclidean distance, in fp32: ``[n d] -> [n]``."""
        codes = self.codes.float()
        # cdist, since it stays in fp32 under autocast, as a matrix product would not
        parts = x.float().split(max(1, DISTANCES // len(codes)))
        return torch.cat([torch.cdist(part, codes).argmin(1) for part in parts])

    @torch.no_grad()
    def update(self, x: Tensor, index: Tensor) -> None:
        """Learn from the vectors ``x [n d]`` of a batch, whose nearest codes are ``index [n]``.

        Batches of several processes count as one: the codebooks of all stay equal.
        """
        x, k = x.float(), len(self.codes)
        counts = _occurrences(index, k).float()
        sums = torch.zeros_like(self.sums).index_add_(0, index, x)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        uniform = counts.sum() / k
        dead = self.counts <= self.restart * uniform
        if dead.any():
            generator = torch.Generator().manual_seed(int(self.updates))  # so that a resumed run draws the same
            errors = (x - self.codes[index]).square().sum(1).cpu()
            chosen = torch.multinomial(errors + 1e-20, int(dead.sum()), replacement=True, generator=generator)
            replacements = x[chosen.to(x.device)]
            if dist.is_available() and dist.is_initialized():
                dist.broadcast(replacements, 0)
            self.counts[dead] = uniform
            self.sums[dead] = uniform * replacements
        self.codes.copy_(self.sums / self.counts[:, None])
        self.updates += 1


class QuantizedLatent(Posterior):
    """The latent before quantisation, without noise, and the codebook that quantises it.

    Args:
        latent: ``[b z h w]``, fp32.
        codebook: codebook of the first stage; None for latents from a cache, which are only decoded.
    """

    cached = ("latent",)

    def __init__(self, latent: Tensor, codebook: Codebook | None):
        self.latent = latent
        self.codebook = codebook

    @property
    def mode(self) -> Tensor:
        return self.latent

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.latent)

    def sample(self, noise: Tensor) -> Tensor:
        """Return the latent; the noise is not used."""
        return self.latent

    @property
    def vectors(self) -> Tensor:
        """The latent's positions as rows, ``[b*h*w z]``, detached."""
        return _vectors(self.latent.detach())

    @cached_property
    def index(self) -> Tensor:
        """The nearest code of each of :attr:`vectors`, ``[b*h*w]``, in the codebook's state at first access."""
        assert self.codebook is not None
        return self.codebook.nearest(self.vectors)

    def regularization(self) -> Tensor:
        """Return the commitment loss ``[b]`` (arXiv 1711.00937, eq. 3): squared distance to codes, summed over each latent."""
        assert self.codebook is not None
        quantized = _latent(self.codebook.codes[self.index], self.latent)
        return (self.latent - quantized).square().flatten(1).sum(1)

    def sums(self) -> dict[str, Tensor]:
        assert self.codebook is not None
        positions = _occurrences(self.index, len(self.codebook.codes))
        return {"commitment": self.regularization().detach().sum(), "positions": positions}

    @classmethod
    def metrics(cls, sums: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
        """Return ``commitment`` (mean loss), ``usage`` (share of codes that occur), ``perplexity`` (exp of the codes' entropy).

        The perplexity is k if all k codes occur equally often, and 1 if only one occurs.
        """
        share = sums["positions"] / sums["positions"].sum()
        return {
            "commitment": sums["commitment"] / images,
            "usage": (share > 0).float().mean(),
            "perplexity": torch.special.entr(share).sum().exp(),
        }

    @classmethod
    def cat(cls, posteriors: Sequence[Self]) -> Self:
        return cls(torch.cat([each.latent for each in posteriors]), posteriors[0].codebook)

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["latent"], None)


class VQ(ConvolutionalAutoencoder):
    """VQ-VAE with continuous latents ``[b z h w]``; ``decode`` replaces each position by its nearest code first.

    In training, gradients pass the quantisation unchanged (straight-through estimator), and the codebook learns by ``update``.
    """

    posterior_type = QuantizedLatent

    def __init__(self, config: VQConfig):
        super().__init__(config, config.latent_channels)
        self.codebook = Codebook(config.codes, config.latent_channels, config.decay, config.restart)

    def make_posterior(self, parameters: Tensor) -> QuantizedLatent:
        return QuantizedLatent(parameters, self.codebook)

    def quantize(self, latent: Tensor) -> Tensor:
        """Return the nearest code at each position of ``latent [b z h w]``; its gradient is that of the identity."""
        index = self.codebook.nearest(_vectors(latent.detach()))
        quantized = _latent(self.codebook.codes[index], latent).to(latent.dtype)
        return quantized + (latent - latent.detach())

    def _decoder_input(self, latent: Tensor) -> Tensor:
        return super()._decoder_input(self.quantize(latent))

    def update(self, posterior: Posterior) -> None:
        assert isinstance(posterior, QuantizedLatent)
        self.codebook.update(posterior.vectors, posterior.index)


def _occurrences(index: Tensor, k: int) -> Tensor:
    """Return how often each of 0 .. k - 1 occurs in ``index [n]``: ``[k]`` of int64."""
    return torch.zeros(k, dtype=torch.int64, device=index.device).index_add_(0, index, torch.ones_like(index))


def _vectors(latent: Tensor) -> Tensor:
    """``[b z h w] -> [b*h*w z]``"""
    return latent.movedim(1, 3).flatten(0, 2)


def _latent(vectors: Tensor, like: Tensor) -> Tensor:
    """Invert :func:`_vectors` for a latent of the shape of ``like``."""
    b, z, h, w = like.shape
    return vectors.view(b, h, w, z).movedim(3, 1)
