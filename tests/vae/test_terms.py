"""Additional terms of the loss of stage 1, against their closed forms or other implementations."""

from __future__ import annotations

from typing import Any

import pytest
import pywt
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from ldm.clip.image import ViTConfig
from ldm.config import from_dict
from ldm.errors import ConfigError
from ldm.vae.discriminator import PatchDiscriminator
from ldm.vae.loss import VAELossConfig
from ldm.vae.terms.equivariance import EquivarianceConfig
from ldm.vae.terms.lecam import LeCam
from ldm.vae.terms.ms_ssim import EXPONENTS, MSSSIM
from ldm.vae.terms.perceptual import Perceptual
from ldm.vae.terms.r1 import R1
from ldm.vae.terms.wavelet import Wavelet, haar


def images(size: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Distances


@pytest.mark.parametrize(("scales", "size"), [(5, 176), (3, 48), (1, 16)])
def test_ms_ssim_is_that_of_torchmetrics(scales: int, size: int) -> None:
    x = images(size)
    y = (x + 0.3 * images(size, seed=1)).clamp(-1, 1)
    exponents = tuple(each / sum(EXPONENTS[:scales]) for each in EXPONENTS[:scales])
    expected = multiscale_structural_similarity_index_measure(
        (y + 1) / 2, (x + 1) / 2, data_range=1.0, betas=exponents, reduction="none"
    )
    torch.testing.assert_close(1 - MSSSIM(scales).distance(x, y), expected, rtol=1e-4, atol=1e-5)


def test_ms_ssim_of_plain_images_compares_their_luminance() -> None:
    """(2 m n + c) / (m^2 + n^2 + c) of the values m, n in [0, 1], with c = 0.01^2, for all scales together."""
    for value, other in ((-0.05, 0.05), (-0.9, -0.8), (0.8, 0.9)):
        x, y = (torch.full((1, 3, 16, 16), each) for each in (value, other))
        m, n = (value + 1) / 2, (other + 1) / 2
        expected = 1 - (2 * m * n + 1e-4) / (m**2 + n**2 + 1e-4)
        assert MSSSIM(1).distance(x, y).item() == pytest.approx(expected, abs=1e-3)  # single precision


def test_ms_ssim_of_opposite_images_has_finite_gradients() -> None:
    x = images(48)
    y = (-x).requires_grad_()
    distance = MSSSIM(2).distance(x, y)
    distance.sum().backward()
    assert (distance > 0.9).all()
    assert y.grad is not None
    assert y.grad.isfinite().all()


def test_the_wavelet_transform_is_that_of_pywavelets_and_keeps_the_energy() -> None:
    x = images(16, count=1)
    average, details = haar(x)
    expected, bands = pywt.dwt2(x.numpy(), "haar")
    torch.testing.assert_close(average, torch.from_numpy(expected))
    for ours, theirs in zip(details[0].abs(), (bands[1], bands[0], bands[2]), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs)[0].abs())
    torch.testing.assert_close(average.square().sum() + details.square().sum(), x.square().sum())


def test_the_wavelet_loss_sees_details_of_its_scales_alone() -> None:
    x, checkers = images(16), torch.ones(2, 3, 16, 16)
    checkers[..., 1::2] *= -1
    checkers[..., 1::2, :] *= -1
    assert Wavelet(3).distance(x, x + 0.25).abs().max() < 1e-6
    # Of each 2 x 2 square, one coefficient is 4 * 0.5 / 2 and the others are 0.
    torch.testing.assert_close(Wavelet(1).distance(x, x + 0.5 * checkers), torch.full((2,), 0.25))
    coarse = checkers.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :16, :16]
    assert Wavelet(1).distance(x, x + coarse).abs().max() < 1e-6
    torch.testing.assert_close(Wavelet(2).distance(x, x + 0.5 * coarse), torch.full((2,), 0.125))
    assert Wavelet(2).distance(x[..., :7, :5], x[..., :7, :5] + 1).abs().max() < 1e-6, "odd sides"


def test_the_perceptual_distance_is_that_of_states_of_unit_length() -> None:
    tower = ViTConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2).build(8)
    x, y = images(16), images(16, seed=1)
    chosen = Perceptual(tower, [1, 3], "a.safetensors").train()
    assert not any(module.training for module in tower.modules())
    states = [tower.block_states(each) for each in (x, y)]
    torch.testing.assert_close(tower.final_norm(states[0][-1]), tower.states(x))
    expected = torch.zeros(2)
    for layer in (0, 2):
        cosine = torch.cosine_similarity(states[0][layer], states[1][layer], dim=-1)
        expected += (2 - 2 * cosine).mean(1) / 2
    torch.testing.assert_close(chosen.distance(x, y), expected, rtol=1e-4, atol=1e-6)
    assert chosen.distance(x, x).abs().max() == 0
    y.requires_grad_()
    chosen.distance(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in tower.parameters())
    with pytest.raises(ConfigError, match=r"names block 4, but the image tower of a\.safetensors has 3"):
        Perceptual(tower, [4], "a.safetensors")


# Regularization of the discriminator


class Linear(nn.Module):
    """Logit of each of four quarters of an image: the sum of its values times a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, image: Tensor) -> Tensor:
        return self.factor * nn.functional.avg_pool2d(image.sum(1, keepdim=True), 4, divisor_override=1)


def test_r1_of_a_linear_discriminator_is_known() -> None:
    """Its output is factor / 4 times the sum of n values: R1 is n (factor / 4)^2 / 2, and its derivative n factor / 16."""
    discriminator, image = Linear(), images(8).requires_grad_()
    loss = R1().discriminator_loss(image, discriminator(image), torch.zeros(2))
    values = 3 * 8 * 8
    torch.testing.assert_close(loss, torch.tensor(0.5 * values * 0.125**2))
    loss.backward()
    torch.testing.assert_close(discriminator.factor.grad, torch.tensor(values * 0.5 / 16))


def test_r1_of_the_patch_discriminator_is_the_gradient_by_differences() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 4, 1).double()
    image = images(16).double().requires_grad_()
    loss = R1().discriminator_loss(image, discriminator(image), torch.zeros(2))
    # The batch norm makes an output depend on all images, so that the gradient is that of the sum.
    direction = torch.autograd.grad(discriminator(image).flatten(1).mean(1).sum(), image)[0]
    step = 1e-5
    ahead, behind = (discriminator(image + sign * step * direction).flatten(1).mean(1).sum() for sign in (1, -1))
    torch.testing.assert_close(0.5 * (ahead - behind) / (2 * step) / 2, loss.double(), rtol=1e-3, atol=0)
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in discriminator.named_parameters() if "weight" in name)


def test_lecam_pulls_logits_to_the_moving_averages_of_the_others() -> None:
    term = LeCam(decay=0.9)
    first = term.discriminator_loss(images(4), torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0]))
    assert (term.mean_real, term.mean_fake) == (2.0, -1.5)
    torch.testing.assert_close(first, torch.tensor((2.5**2 + 4.5**2) / 2 + (3.0**2 + 4.0**2) / 2))
    real = torch.tensor([0.0, 0.0], requires_grad=True)
    second = term.discriminator_loss(images(4), real, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(term.mean_real, torch.tensor(0.9 * 2.0))
    torch.testing.assert_close(term.mean_fake, torch.tensor(0.9 * -1.5 + 0.1 * 0.5))
    torch.testing.assert_close(second, torch.tensor(1.3**2 + 1.3**2))
    second.backward()
    torch.testing.assert_close(real.grad, torch.tensor([1.3, 1.3]))


# Equivariance


def test_latents_are_transformed_as_images_are() -> None:
    """With a latent that is the image reduced by averaging, which commutes with rotations."""
    term, generator = EquivarianceConfig(probability=1.0, min_scale=1.0).build(), torch.Generator().manual_seed(0)
    image = images(16)
    latent, seen = nn.functional.avg_pool2d(image, 4), set()
    for _ in range(20):
        target, moved = term.transform(image, latent, generator)
        torch.testing.assert_close(nn.functional.avg_pool2d(target, 4), moved)
        seen.add(next(turns for turns in range(4) if torch.equal(target, torch.rot90(image, turns, (2, 3)))))
    assert seen == {1, 2, 3}, "each batch is transformed"


def test_scales_are_uniform_and_latents_keep_the_factor() -> None:
    config = EquivarianceConfig(probability=0.75, min_scale=0.5, rotations=False)
    term, generator = config.build(), torch.Generator().manual_seed(0)
    image, latent = torch.full((1, 3, 32, 64), 0.3), torch.full((1, 4, 8, 16), -2.0)
    sides, same = [], 0
    for _ in range(400):
        target, scaled = term.transform(image, latent, generator)
        same += target is image and scaled is latent
        assert target.shape[2:] == (4 * scaled.shape[2], 4 * scaled.shape[3])
        torch.testing.assert_close(target, torch.full_like(target, 0.3))
        torch.testing.assert_close(scaled, torch.full_like(scaled, -2.0))
        if target is not image:
            sides.append(scaled.shape[3])
    assert 70 < same < 130  # a quarter of 400, and some that were scaled by 1 are others
    assert min(sides) == 8
    assert max(sides) == 16
    assert abs(sum(sides) / len(sides) - 12) < 0.5
    assert config.smallest(32, 4) == 16


# Configs


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"terms": [{"kind": "r1"}]}, "terms contains r1, which regularizes the discriminator, but adversarial is 0"),
        ({"terms": ["wavelet", "wavelet"]}, "terms contains wavelet twice"),
        ({"terms": [{"kind": "wavelet", "weight": 0}]}, "weight is 0"),
        ({"terms": [{"kind": "wavelet", "levels": 0}]}, "levels must be at least 1"),
        ({"terms": [{"kind": "ms_ssim", "scales": 6}]}, "scales must be from 1 to 5, not 6"),
        ({"terms": [{"kind": "lecam", "decay": 1.0}], "adversarial": 1.0}, r"decay must be in \[0, 1\)"),
        ({"terms": ["perceptual"]}, "the key 'checkpoint' is missing"),
        ({"terms": [{"kind": "perceptual", "checkpoint": "a", "layers": [0]}]}, "different numbers from 1"),
        ({"terms": [{"kind": "equivariance", "weight": 2.0}]}, "weight has no effect on equivariance"),
        ({"terms": [{"kind": "equivariance", "min_scale": 0}]}, "must be above 0 and at most 1"),
        ({"terms": [{"kind": "equivariance", "min_scale": 1, "rotations": False}]}, "transforms nothing"),
        ({"terms": ["wavelets"]}, "unknown kind 'wavelets'; did you mean 'wavelet'"),
    ],
)
def test_impossible_terms_are_refused(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(VAELossConfig, loss)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"terms": ["ms_ssim"]}, "5 scales needs images of at least 176 pixels, .* 64 x 64; set scales to 3 at most"),
        ({"terms": [{"kind": "wavelet", "levels": 7}]}, "7 levels needs images of at least 128 pixels"),
        (
            {"terms": ["equivariance", {"kind": "ms_ssim", "scales": 3}]},
            "at least 44 pixels, but they have 16 x 16; set scales to 1 at most",
        ),
        (
            {"terms": ["equivariance"], "lpips": 1.0},
            "lpips cannot be used with images of 8 pixels that a term has scaled",
        ),
        ({"terms": ["equivariance"], "adversarial": 1.0}, "disc_layers is 3, .* images of 16 x 16 pixels"),
    ],
)
def test_terms_that_do_not_fit_the_images_are_refused(loss: dict[str, Any], message: str) -> None:
    config = from_dict(VAELossConfig, loss)
    side = 32 if "lpips" in loss else 64
    with pytest.raises(ConfigError, match=message):
        config.check_size(side, side, 8)
    config.check_size(512, 512, 8)
