from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ldm.config import from_dict, to_dict
from ldm.diffusion import Diffusion, UncertaintyLossConfig, WeightedLossConfig
from ldm.diffusion.loss import DenoisingLossConfig
from ldm.diffusion.parametrization import V
from ldm.diffusion.schedule import ScaledLinear
from ldm.diffusion.uncertainty import UncertaintyLoss
from ldm.errors import ConfigError

DIFFUSION = Diffusion(ScaledLinear(), V())
SIGMA = torch.tensor([0.03, 0.4, 1.0, 3.0, 14.0])


def zero(x: Tensor, noise_level: Tensor, conditioning: None) -> Tensor:
    return torch.zeros_like(x)


def with_random_weight() -> UncertaintyLoss:
    torch.manual_seed(0)
    loss = UncertaintyLossConfig(channels=16).build()
    nn.init.normal_(loss.weight)
    return loss


def test_a_section_without_a_kind_is_the_weighted_loss() -> None:
    assert from_dict(DenoisingLossConfig, {"gamma": 3.0}) == WeightedLossConfig(gamma=3.0)
    config = from_dict(DenoisingLossConfig, {"kind": "uncertainty", "norm": "l1", "channels": 8})
    assert config == UncertaintyLossConfig(norm="l1", channels=8)
    assert from_dict(DenoisingLossConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="channels is 0; it must be at least 1"):
        from_dict(DenoisingLossConfig, {"kind": "uncertainty", "channels": 0})


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_the_loss_has_its_closed_form(weighting: str) -> None:
    """exp(-u) L + u with u = sqrt(2 / n) sum_i w_i cos(f_i ln(s) / 4 + p_i), in fp64."""
    x0, noise, loss = torch.randn(5, 3, 4), torch.randn(5, 3, 4), with_random_weight()
    loss.config = UncertaintyLossConfig(channels=16, weighting=weighting)  # type: ignore[arg-type]
    base = WeightedLossConfig(weighting=weighting).build()  # type: ignore[arg-type]
    expected, _ = base(zero, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)
    f, p, w = (tensor.detach().double() for tensor in (loss.frequencies, loss.phases, loss.weight))
    u = math.sqrt(2 / 16) * (w * torch.cos(SIGMA.double()[:, None].log() / 4 * f + p)).sum(1)
    value, sigma = loss(zero, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)
    assert torch.equal(sigma, SIGMA)
    torch.testing.assert_close(value.double(), (-u).exp() * expected + u, rtol=1e-4, atol=1e-4)
    # A validation measures the loss without the weighting.
    assert torch.equal(loss.eval()(zero, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)[0], expected)


def test_it_begins_as_the_loss_that_it_weights() -> None:
    x0, noise = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    values = [
        config.build()(zero, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)[0]
        for config in (UncertaintyLossConfig(), WeightedLossConfig())
    ]
    assert torch.equal(*values)


def test_gradients_reach_the_network_weighted_and_the_uncertainty() -> None:
    """d/dL = exp(-u), d/du = 1 - exp(-u) L."""
    x0, noise, loss = torch.randn(5, 3, 4), torch.randn(5, 3, 4), with_random_weight()
    output = torch.randn(5, 3, 4, requires_grad=True)
    value, _ = loss(lambda *_: output, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)
    value.sum().backward()
    base, _ = loss.eval()(lambda *_: output, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)
    u = loss.uncertainty(SIGMA)
    (alone,) = torch.autograd.grad(base.sum(), output)
    torch.testing.assert_close(output.grad, (-u).exp().detach()[:, None, None] * alone)
    (wanted,) = torch.autograd.grad((u * (1 - (-u).exp() * base).detach()).sum(), loss.weight)
    torch.testing.assert_close(loss.weight.grad, wanted)


def test_the_minimum_is_the_logarithm_of_the_expected_loss() -> None:
    """With a network that predicts 0, the loss of one image is |target|^2; its mean over the noise depends on s."""
    torch.manual_seed(0)
    loss = UncertaintyLossConfig(channels=64).build()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    x0, generator = torch.full((256, 8), 3.0), torch.Generator().manual_seed(0)
    for _ in range(400):
        optimizer.zero_grad()
        loss(zero, DIFFUSION, x0, None, generator)[0].mean().backward()
        optimizer.step()
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0])
    # v = (n - s x0) / sqrt(1 + s^2): E |v|^2 = (1 + 9 s^2) / (1 + s^2)
    expected = ((1 + 9 * sigma**2) / (1 + sigma**2)).log()
    torch.testing.assert_close(loss.uncertainty(sigma).detach(), expected, rtol=0, atol=0.12)


def test_under_autocast_the_uncertainty_stays_in_fp32() -> None:
    loss = with_random_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.uncertainty(SIGMA), with_random_weight().uncertainty(SIGMA))
        assert loss.uncertainty(SIGMA).dtype == torch.float32
