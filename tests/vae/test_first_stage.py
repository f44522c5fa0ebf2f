from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.config import from_dict
from ldm.vae import DiagonalGaussian, FirstStage, FirstStageConfig
from ldm.vae.metrics import measure_latents, psnr


class Given(FirstStage):
    """A first stage whose posteriors come with the batch: channels of mean, then of log-variance."""

    def encode(self, image: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(*image.chunk(2, dim=1))


def test_kl_is_that_of_torch() -> None:
    mean, logvar = torch.randn(4, 3, 5, 2, dtype=torch.float64), torch.randn(4, 3, 5, 2, dtype=torch.float64)
    expected = (
        kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros(()).double(), 1.0)).flatten(1).sum(1)
    )
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)


def test_the_standard_normal_is_at_distance_zero() -> None:
    zeros = torch.zeros(2, 3, 4, 4)
    assert torch.equal(DiagonalGaussian(zeros, zeros).kl(), torch.zeros(2))


def test_extreme_variances_stay_finite() -> None:
    posterior = DiagonalGaussian(torch.zeros(2, 1, 1, 1), torch.tensor([-1e9, 1e9]).reshape(2, 1, 1, 1))
    assert posterior.kl().isfinite().all()
    assert posterior.sample(torch.ones(2, 1, 1, 1)).isfinite().all()


def test_samples_have_the_mean_and_the_deviation() -> None:
    posterior = DiagonalGaussian(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 2 * np.log(0.5)))
    drawn = posterior.sample(torch.randn(1, 1, 200, 200))
    assert abs(drawn.mean() - 3.0) < 0.015  # six standard errors
    assert abs(drawn.std() - 0.5) < 0.011


def test_psnr_of_a_constant_error() -> None:
    """An error of e everywhere, of a range of 2, is 20 log10(2 / e) dB."""
    image = torch.rand(3, 3, 8, 8) * 2 - 1
    errors = torch.tensor([0.02, 0.2, 2.0])
    torch.testing.assert_close(
        psnr(image, image + errors[:, None, None, None]), torch.tensor([40.0, 20.0, 0.0]), atol=1e-3, rtol=0
    )


def batches(moments: Tensor, size: int) -> list[dict[str, Any]]:
    return [{"image": part} for part in moments.split(size)]


def test_latents_are_measured_as_if_all_were_drawn() -> None:
    """Against numpy on very many draws of each posterior, and exactly where the posteriors have no variance."""
    mean = (
        torch.randn(10, 3, 4, 4) * torch.tensor([2.0, 0.5, 1.0])[:, None, None]
        + torch.tensor([5.0, -1.0, 0.0])[:, None, None]
    )
    logvar = torch.randn(10, 3, 4, 4)
    stage = Given(3, 1)
    measure_latents(stage, batches(torch.cat([mean, logvar], dim=1), 4))  # the last batch is smaller
    draws = mean.numpy() + (0.5 * logvar).exp().numpy() * np.random.default_rng(0).standard_normal((4000, 10, 3, 4, 4))
    np.testing.assert_allclose(stage.latent_mean, draws.mean((0, 1, 3, 4)), atol=0.01)
    np.testing.assert_allclose(stage.latent_std, draws.std((0, 1, 3, 4)), rtol=0.01)

    measure_latents(stage, batches(torch.cat([mean, torch.full_like(logvar, -1e3)], dim=1), 3))
    np.testing.assert_allclose(stage.latent_mean, mean.numpy().astype(np.float64).mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stage.latent_std, mean.numpy().astype(np.float64).std((0, 2, 3)), rtol=1e-5)


def test_a_channel_far_from_zero_keeps_its_deviation() -> None:
    """Sums of squares cancel in fp32 long before this."""
    mean = 1e4 + 0.1 * torch.randn(8, 1, 16, 16)
    stage = Given(1, 1)
    measure_latents(stage, batches(torch.cat([mean, torch.full_like(mean, -1e3)], dim=1), 8))
    np.testing.assert_allclose(stage.latent_std, mean.numpy().astype(np.float64).std(), rtol=1e-3)


def test_normalisation_is_undone_and_does_what_it_says() -> None:
    latent = torch.randn(64, 3, 8, 8) * torch.tensor([4.0, 0.1, 1.0])[:, None, None] + 2.0
    stage = Given(3, 1)
    measure_latents(stage, batches(torch.cat([latent, torch.full_like(latent, -1e3)], dim=1), 16))
    normal = stage.normalize(latent)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(stage.denormalize(normal), latent)


def test_the_identity_hands_pictures_through() -> None:
    config = from_dict(FirstStageConfig, {"kind": "identity", "image_channels": 2})
    stage, image = config.build(), torch.randn(3, 2, 5, 7)
    posterior = stage.encode(image)
    assert (config.latent_channels, config.factor) == (stage.latent_channels, stage.factor) == (2, 1)
    assert torch.equal(stage.decode(stage.denormalize(stage.normalize(posterior.mean))), image)
    torch.testing.assert_close(posterior.sample(torch.randn_like(image)), image, atol=1e-5, rtol=0)
