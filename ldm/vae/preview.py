"""A preview of images that needs no decoder: colours as an affine function of the latent at the same place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class LeastSquares:
    """Fits the affine map from latents to colours; its normal equations are summed in fp64, batch by batch."""

    def __init__(self) -> None:
        self.gram, self.products = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(self, latent: Tensor, image: Tensor) -> None:
        """``latent [b z h w]`` and the images of it ``[b c fh fw]``, each of whose colours is the mean of f x f pixels."""
        colours = F.interpolate(image.float(), size=latent.shape[-2:], mode="area")
        z, y = (each.double().cpu().movedim(1, 0).flatten(1) for each in (latent, colours))
        z = torch.cat([z, torch.ones_like(z[:1])])
        self.gram, self.products = self.gram + z @ z.T, self.products + y @ z.T

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight ``[c z]`` and bias ``[c]`` in fp64; of the many solutions where latents are dependent, the smallest."""
        means, products = self.gram[-1] / self.gram[-1, -1], self.products / self.gram[-1, -1]
        mean, colour = means[:-1], products[:, -1]
        # centred: the sums of a latent far from 0 are nearly singular
        covariance = self.gram[:-1, :-1] / self.gram[-1, -1] - torch.outer(mean, mean)
        shared = products[:, :-1] - torch.outer(colour, mean)
        weight = torch.linalg.lstsq(covariance, shared.T, driver="gelsd").solution.T
        return weight, colour - weight @ mean
