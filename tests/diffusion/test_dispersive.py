from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.config import from_dict
from ldm.diffusion import DenoisingLossConfig, Diffusion, DispersiveLossConfig, WeightedLossConfig
from ldm.diffusion.dispersive import dispersion
from ldm.diffusion.parametrization import V
from ldm.diffusion.schedule import ScaledLinear
from ldm.errors import ConfigError


def test_the_dispersion_is_the_mean_over_all_pairs() -> None:
    z = torch.randn(5, 2, 3, dtype=torch.float64)
    pairs = [math.exp(-((a - b) ** 2).mean() / 0.7) for a in z for b in z]
    assert dispersion(z, 0.7).item() == pytest.approx(math.log(sum(pairs) / 25), rel=1e-5)


def test_it_is_0_for_equal_samples_and_the_share_of_an_own_sample_far_apart() -> None:
    assert dispersion(torch.ones(6, 4), 0.5).item() == pytest.approx(0, abs=1e-5)
    assert dispersion(100 * torch.eye(6), 0.5).item() == pytest.approx(-math.log(6), rel=1e-5)


def test_its_gradient_moves_samples_apart() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    dispersion(z, 0.5).backward()
    assert z.grad is not None
    assert z.grad[0, 0] > 0 > z.grad[1, 0]
    assert torch.equal(z.grad[:, 1], torch.zeros(2))


def test_in_bf16_it_is_computed_in_fp32() -> None:
    z = 10 + 0.01 * torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inner = dispersion(z, 0.5)
    assert torch.equal(inner, dispersion(z, 0.5))


def test_it_is_added_in_training_to_the_weighted_loss() -> None:
    x0, noise, diffusion = torch.randn(4, 3), torch.randn(4, 3), Diffusion(ScaledLinear(), V())
    sigma, z = torch.tensor([0.1, 1.0, 2.0, 5.0]), torch.randn(4, 6)

    def network(x: Tensor, noise_level: Tensor, conditioning: None) -> Tensor:
        return torch.zeros_like(x)

    config = DispersiveLossConfig(strength=0.4, feature="middle.1")
    assert config.features == ("middle.1",)
    loss, plain = config.build(), WeightedLossConfig().build()
    expected, _ = plain(network, diffusion, x0, None, sigma=sigma, noise=noise)
    value, _ = loss(network, diffusion, x0, None, sigma=sigma, noise=noise, features={"middle.1": z})
    torch.testing.assert_close(value, expected + 0.4 * dispersion(z, 0.5))
    validation, _ = loss.eval()(network, diffusion, x0, None, sigma=sigma, noise=noise, features={"middle.1": z})
    assert torch.equal(validation, expected)


@pytest.mark.parametrize("values", [{"strength": -1}, {"temperature": 0}])
def test_impossible_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="they must be at least 0 and above 0"):
        from_dict(DenoisingLossConfig, {"kind": "dispersive"} | values)
