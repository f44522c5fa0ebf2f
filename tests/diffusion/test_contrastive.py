from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.config import from_dict
from ldm.diffusion import ContrastiveFlowLossConfig, DenoisingLossConfig, Diffusion, WeightedLossConfig
from ldm.diffusion.parametrization import Flow
from ldm.diffusion.schedule import Flow as FlowSchedule
from ldm.errors import ConfigError

DIFFUSION = Diffusion(FlowSchedule(), Flow())
SIGMA = torch.tensor([0.03, 0.4, 1.0, 3.0])


def test_the_loss_has_its_closed_form() -> None:
    """|F - (n - x0)|^2 - strength |F - (n' - x0')|^2 with the next sample's n' and x0'."""
    x0, noise, output = (torch.randn(4, 3, 5) for _ in range(3))
    loss = ContrastiveFlowLossConfig(strength=0.2).build()

    def network(x: Tensor, noise_level: Tensor, conditioning: None) -> Tensor:
        return output

    value, _ = loss(network, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)
    velocity = noise - x0
    for i in range(4):
        own, other = (((output[i] - velocity[j]) ** 2).mean() for j in (i, (i + 1) % 4))
        torch.testing.assert_close(value[i], own - 0.2 * other)
    plain, _ = WeightedLossConfig().build()(network, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)
    validation, _ = loss.eval()(network, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)
    assert torch.equal(validation, plain)


def test_the_minimum_is_beyond_the_own_target() -> None:
    """F = (v - strength v') / (1 - strength), at which the gradient is zero."""
    x0, noise, strength = torch.randn(4, 3), torch.randn(4, 3), 0.3
    velocity = noise - x0
    best = ((velocity - strength * velocity.roll(-1, 0)) / (1 - strength)).requires_grad_()
    loss = ContrastiveFlowLossConfig(strength=strength).build()
    loss(lambda *_: best, DIFFUSION, x0, None, sigma=SIGMA, noise=noise)[0].sum().backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-5


@pytest.mark.parametrize("strength", [-0.1, 1.0])
def test_a_loss_without_a_minimum_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError, match="strength is"):
        from_dict(DenoisingLossConfig, {"kind": "contrastive_flow", "strength": strength})
