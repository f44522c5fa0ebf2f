"""Measurements on a first stage: PSNR, SSIM, and the statistics of its latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import TrainingError
from ldm.vae.first_stage import FirstStage
from ldm.vae.preview import LeastSquares

WINDOW = 11
"""Side of the window of SSIM in pixels; smaller images have none."""


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each image ``[b c h w]`` in [-1, 1]: ``[b]``; the peak is the range, 2."""
    error = (image - reconstruction).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp(min=1e-10))


def ssim(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images ``[b c h w]`` in [-1, 1]: ``[b]`` (Wang et al. 2004, equation 13).

    With a Gaussian window of standard deviation 1.5 and 11 pixels, and images reflected at their borders; NaN for images that are
    smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(image.shape[2:]) < WINDOW:
        return torch.full((len(image),), torch.nan, device=image.device)
    with torch.autocast(image.device.type, enabled=False):  # variances are differences of squares
        values = structural_similarity_index_measure(
            (reconstruction.float() + 1) / 2, (image.float() + 1) / 2, data_range=1.0, reduction="none"
        )
    assert isinstance(values, Tensor)
    return values.reshape(len(image))


@torch.no_grad()
def measure_latents(
    first_stage: FirstStage, batches: Iterable[Mapping[str, Any]], device: torch.device | str = "cpu"
) -> None:
    """Set ``latent_mean``, ``latent_std`` and ``latent_preview`` of a first stage from the images in ``batches``.

    Mean and standard deviation are those of each channel of latents sampled for all images. By the law of total variance,
    var(z) = E[posterior variance] + var(posterior mean); summed in fp64. The preview is the least-squares map from the modes
    to the images.

    Args:
        first_stage: first stage in evaluation mode, on ``device``.
        batches: batches with ``image [b c h w]`` in [-1, 1].
        device: device on which images are encoded.

    Raises:
        TrainingError: the latents are not finite.
    """
    channels = first_stage.latent_channels
    count, total, squares = (
        0,
        torch.zeros(channels, dtype=torch.float64),
        torch.zeros(channels, dtype=torch.float64),
    )
    fit = LeastSquares()
    for batch in batches:
        image = batch["image"].to(device)
        posterior = first_stage.encode(image)
        fit.add(posterior.mode, image)
        mean, variance = posterior.mode.double().cpu(), posterior.variance.double().cpu()
        total += mean.sum((0, 2, 3))
        squares += (mean.square() + variance).sum((0, 2, 3))
        count += mean.numel() // channels
    if not (total.isfinite().all() and squares.isfinite().all()):
        raise TrainingError(
            "the first stage encodes the training images to latents that are not finite, so their statistics cannot be measured; "
            "train it again with a lower vae.train.learning_rate."
        )
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    first_stage.latent_mean.copy_(mean)
    first_stage.latent_std.copy_(std)
    weight, bias = fit.solve()
    preview = torch.cat([weight * std, (bias + weight @ mean)[:, None]], dim=1)  # of normalised latents
    first_stage.register_buffer("latent_preview", preview.to(first_stage.latent_mean))
