"""Preview of images without the decoder: colours as an affine function of the latent at the same place."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.vae.first_stage import FirstStage, HasPreview

_FITTING = threading.Lock()


def preview(first_stage: FirstStage, latent: Tensor) -> Tensor:
    """Return a cheap estimate ``[b c h w]``, one pixel per position, of the images of normalised latents ``[b z h w]``.

    It is fp32, approximately in [-1, 1]. The map is ``first_stage.latent_preview``; if that is None, it is fitted to the decoder
    at the first call and kept as ``first_stage.fitted_preview``. Threads may call this at the same time.
    """
    if isinstance(first_stage, HasPreview):
        return first_stage.preview(latent)
    affine = first_stage.latent_preview
    if affine is None:
        with _FITTING:
            if first_stage.fitted_preview is None:
                first_stage.fitted_preview = _fit_to_decoder(first_stage)
            affine = first_stage.fitted_preview
    affine = affine.to(latent.device)
    weight, bias = affine[:, :-1], affine[:, -1]
    return F.conv2d(latent.float(), weight[..., None, None], bias)


@torch.no_grad()
def _fit_to_decoder(first_stage: FirstStage) -> Tensor:
    """Fit the map ``[c z + 1]`` to decoded random latents, which are smooth: closer to images than decoded white noise."""
    fit, generator = LeastSquares(), torch.Generator().manual_seed(0)
    for _ in range(4):
        noise = torch.randn(16, first_stage.latent_channels, 2, 2, generator=generator).to(first_stage.latent_mean)
        latent = F.interpolate(noise, size=(8, 8), mode="bilinear")
        z = first_stage.denormalize(latent).to(next(first_stage.parameters()).dtype)
        fit.add(latent, first_stage.decode(z).clamp(-1, 1))
    weight, bias = fit.solve()
    return torch.cat([weight, bias[:, None]], dim=1).to(first_stage.latent_mean)


class LeastSquares:
    """Least-squares fit of the affine map from latents to colours; the normal equations are summed in fp64, batch by batch."""

    def __init__(self) -> None:
        self.gram, self.products = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(self, latent: Tensor, image: Tensor) -> None:
        """Add latents ``[b z h w]`` and their images ``[b c fh fw]``; a position's colour is the mean of its f x f pixels."""
        colours = F.interpolate(image.float(), size=latent.shape[-2:], mode="area")
        z, y = (each.double().cpu().movedim(1, 0).flatten(1) for each in (latent, colours))
        z = torch.cat([z, torch.ones_like(z[:1])])
        self.gram, self.products = self.gram + z @ z.T, self.products + y @ z.T

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weight ``[c z]`` and bias ``[c]`` in fp64; the smallest solution if channels of the latents are dependent."""
        means, products = self.gram[-1] / self.gram[-1, -1], self.products / self.gram[-1, -1]
        mean, colour = means[:-1], products[:, -1]
        # centred: the sums of a latent far from 0 are nearly singular
        covariance = self.gram[:-1, :-1] / self.gram[-1, -1] - torch.outer(mean, mean)
        shared = products[:, :-1] - torch.outer(colour, mean)
        weight = torch.linalg.lstsq(covariance, shared.T, driver="gelsd").solution.T
        return weight, colour - weight @ mean
