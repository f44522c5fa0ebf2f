"""Statistics of the latents of a first stage, as the denoiser sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.evaluation.intervals import jackknife
from ldm.evaluation.metric import Number, metric

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject


@metric("latents", "vae")
@torch.no_grad()
def latents(subject: Subject) -> Iterator[Number]:
    """Measure the statistics of normalized latents on the evaluated split.

    ``latent_mean`` is the largest absolute mean of a channel and ``latent_std`` the standard deviation over all of its latents
    that is farthest from 1; 0 and 1 are what the denoiser expects. ``latent_correlation`` is the largest absolute correlation of
    two channels, and ``latent_noise`` the share of the variance that is the posterior's own noise, the mean over channels.
    """
    stage = subject.first_stage
    if stage is None:
        return
    sums: list[Tensor] = []  # of each image: means, second moments and noise of its channels
    for batch in subject.measured():
        posterior = subject.encode(batch["image"])
        mean = stage.normalize(posterior.mode.float()).double().cpu().flatten(2)
        scale = stage.latent_std.double().cpu()[:, None].square()
        noise = (posterior.variance.double().cpu().flatten(2) / scale).mean(2)
        moments = torch.einsum("bip,bjp->bij", mean, mean) / mean.shape[2]
        sums.append(torch.cat([mean.mean(2), noise, moments.flatten(1)], dim=1))
    table, z = torch.cat(sums), stage.latent_channels

    def statistics(index: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, noise, moments = table[torch.as_tensor(index)].mean(0).split([z, z, z * z])
        covariance = moments.reshape(z, z) - mean[:, None] * mean
        variance = covariance.diagonal().clamp(min=1e-12)
        correlation = covariance / variance.sqrt()[:, None] / variance.sqrt()
        correlation.fill_diagonal_(0)
        total = variance + noise
        return mean, total.sqrt(), correlation, noise / total

    def farthest(std: Tensor) -> float:
        return float(std[(std - 1).abs().argmax()])

    values = {
        "latent_mean": lambda index: float(statistics(index)[0].abs().max()),
        "latent_std": lambda index: farthest(statistics(index)[1]),
        "latent_correlation": lambda index: float(statistics(index)[2].abs().max()),
        "latent_noise": lambda index: float(statistics(index)[3].mean()),
    }
    for name, value in values.items():
        yield Number(name, jackknife(len(table), value).within(0), len(table), "neither", parameters={"channels": z})
