from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from ldm.config import from_dict
from ldm.errors import ConfigError, LdmError, MissingExtraError
from ldm.vae import DiagonalGaussian
from ldm.vae.discriminator import PatchDiscriminator
from ldm.vae.loss import AutoencoderLossConfig, GeneratorLoss, ReconstructionLoss, adaptive_weight, hinge_loss


def test_errors_are_summed_over_a_picture() -> None:
    image = torch.zeros(2, 3, 4, 5)
    reconstruction = torch.stack([torch.full((3, 4, 5), 0.5), torch.full((3, 4, 5), -2.0)])
    loss = ReconstructionLoss(AutoencoderLossConfig(l1=2.0, l2=3.0))
    values = 3 * 4 * 5
    expected = torch.tensor([values * (2 * 0.5 + 3 * 0.25), values * (2 * 2.0 + 3 * 4.0)])
    torch.testing.assert_close(loss(image, reconstruction), expected)


def test_kl_is_a_mean_over_the_batch() -> None:
    mean = torch.tensor([1.0, 3.0])[:, None, None, None].expand(2, 2, 3, 3)
    posterior = DiagonalGaussian(mean, torch.zeros_like(mean))
    assert posterior.regularization().mean() == (18 * 0.5 + 18 * 4.5) / 2


def test_hinge_loss() -> None:
    """Zero once both sides are beyond their margins; half of each shortfall else."""
    assert hinge_loss(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -9.0])) == 0
    assert hinge_loss(torch.zeros(4), torch.zeros(4)) == 1
    torch.testing.assert_close(
        hinge_loss(torch.tensor([0.5, 2.0]), torch.tensor([1.0])), torch.tensor(0.5 * (0.25 + 2.0))
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_adaptive_weight_makes_both_pull_alike(scale: float) -> None:
    """At the last layer, weight * generator loss has a gradient as long as that of the reconstruction."""
    layer = nn.Conv2d(4, 3, 3, padding=1)
    out = layer(torch.randn(2, 4, 6, 6))
    reconstruction, generator = out.square().sum(), scale * out.tanh().sum()
    weight = adaptive_weight(reconstruction, generator, layer.weight)
    wanted, found = (
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in (reconstruction, generator)
    )
    assert not weight.requires_grad
    torch.testing.assert_close((weight * found).norm(), wanted.norm(), rtol=1e-2, atol=0)


def test_the_adaptive_weight_is_bounded() -> None:
    layer = nn.Conv2d(1, 1, 1)
    out = layer(torch.randn(1, 1, 2, 2))
    assert adaptive_weight(1e9 * out.square().sum(), 0 * out.sum(), layer.weight) == 1e4


@pytest.mark.parametrize("autocast", [False, True])
def test_generator_and_discriminator_share_a_forward_pass_and_keep_their_gradients(autocast: bool) -> None:
    layer, discriminator = nn.Conv2d(4, 3, 3, padding=1), PatchDiscriminator(3, 4, 1)
    image, x = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    parameters = list(discriminator.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, logits = GeneratorLoss.of(discriminator, layer(x))
        generator = -discriminator(layer(x)).float().mean()
        losses = [hinge_loss(discriminator(image), fake) for fake in (logits, discriminator(layer(x).detach()))]
    found, expected = (torch.autograd.grad(3 * each, layer.weight)[0] for each in (loss, generator))
    tolerance = {"rtol": 0.02, "atol": 1e-3} if autocast else {}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(loss, generator.float(), **tolerance)
    ours, separate = (torch.autograd.grad(each, parameters) for each in losses)
    torch.testing.assert_close(ours, separate)


def test_a_logit_sees_its_patch_alone() -> None:
    """Three strided convolutions see 70 pixels (arXiv 1611.07004): by the gradient of one logit."""
    network = PatchDiscriminator(3, 2, 3).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    image = torch.ones(1, 3, 160, 160, requires_grad=True)
    logits = network(image)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = image.grad[0].abs().sum(0) > 0
    assert [int(seen.any(axis).sum()) for axis in (0, 1)] == [70, 70]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"l1": 0.0}, "l1 or l2 must be above 0"),
        ({"kl": -1.0}, "must not be negative"),
        ({"disc_layers": 0}, "disc_layers must be at least 1"),
        ({"disc_strat": 3}, r"unknown key 'disc_strat'; did you mean 'disc_start'\?"),
    ],
)
def test_impossible_losses_are_refused(config: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(AutoencoderLossConfig, config)


def test_without_the_package_lpips_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(
        MissingExtraError, match=r"vae\.loss\.lpips above 0\) needs the package 'lpips'; .*ldm\[lpips\]"
    ):
        ReconstructionLoss(AutoencoderLossConfig(lpips=1.0))
    ReconstructionLoss(AutoencoderLossConfig(lpips=0.0))


def test_without_its_weights_lpips_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """A machine without a network and with an empty hub folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    for direct in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(direct, raising=False)
    with pytest.raises(LdmError, match=r"VGG weights .* put them into torch's hub folder or set vae\.loss\.lpips=0"):
        ReconstructionLoss(AutoencoderLossConfig(lpips=1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lpips_in_training_is_that_of_the_package_and_finite(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Under autocast, without the dropout that the package trains its weights with, and beyond the range of fp16."""
    from lpips import LPIPS

    network = LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    for layer in network.lins:
        layer.model[-1].weight.abs_()
    monkeypatch.setattr("ldm.vae.loss._lpips", lambda: network)
    loss = ReconstructionLoss(AutoencoderLossConfig(l1=1e-6, lpips=1000.0)).train()
    image, reconstruction = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    expected = 1000 * network(image, reconstruction).flatten() * image.numel()
    assert expected > torch.finfo(torch.float16).max
    reconstruction.requires_grad_()
    with torch.autocast("cpu", dtype):
        found = loss(image, reconstruction)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float16 else 0.05, atol=0)
    found.sum().backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.isfinite().all()
    assert reconstruction.grad.any()
