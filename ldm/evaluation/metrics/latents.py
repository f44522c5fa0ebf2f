"""Statistics of the latents of a first stage, as the denoiser sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.evaluation.intervals import Estimate, jackknife
from ldm.evaluation.metric import Number, metric

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject


@metric("latents", "vae")
@torch.no_grad()
def latents(subject: Subject) -> Iterator[Number]:
    """Measure the statistics of normalized latents on the evaluated split.

    ``latent_mean`` is the largest absolute mean of a channel; ``latent_std_min`` and ``latent_std_max`` are the smallest and the
    largest standard deviation of a channel over all latents. The denoiser expects 0 and 1. ``latent_correlation`` is the largest
    absolute correlation of two channels, and ``latent_noise`` the share of the variance that is the posterior's own noise, the
    mean over channels.
    """
    stage = subject.first_stage
    if stage is None:
        return
    rows: list[Tensor] = []
    for batch in subject.measured():
        posterior = subject.encode(batch["image"])
        mean = stage.normalize(posterior.mode.float()).double().cpu().flatten(2)
        scale = stage.latent_std.double().cpu()[:, None].square()
        noise = (posterior.variance.double().cpu().flatten(2) / scale).mean(2)
        moments = torch.einsum("bip,bjp->bij", mean, mean) / mean.shape[2]
        rows.append(torch.cat([mean.mean(2), noise, moments.flatten(1)], dim=1))
    table = torch.cat(rows)
    for name, value in estimates(table).items():
        yield Number(name, value, len(table), "neither", parameters={"channels": stage.latent_channels})


def estimates(table: Tensor) -> dict[str, Estimate]:
    """Return the statistics of latents from the means over the positions of each image, with intervals over images.

    Args:
        table: ``[n 2z+z^2]``, for each image the means of z channels, the variances of their noise, and the products of all
            pairs of channels.
    """
    z = math.isqrt(1 + table.shape[1]) - 1

    def statistics(index: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, noise, moments = table[torch.as_tensor(index)].mean(0).split([z, z, z * z])
        covariance = moments.reshape(z, z) - mean[:, None] * mean
        variance = covariance.diagonal().clamp(min=1e-12)
        correlation = covariance / variance.sqrt()[:, None] / variance.sqrt()
        correlation.fill_diagonal_(0)
        total = variance + noise
        return mean, total.sqrt(), correlation, noise / total

    values = {
        "latent_mean": lambda index: float(statistics(index)[0].abs().max()),
        "latent_std_min": lambda index: float(statistics(index)[1].min()),
        "latent_std_max": lambda index: float(statistics(index)[1].max()),
        "latent_correlation": lambda index: float(statistics(index)[2].abs().max()),
        "latent_noise": lambda index: float(statistics(index)[3].mean()),
    }
    return {name: jackknife(len(table), value).within(0) for name, value in values.items()}
