from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Diffusion, guided
from ldm.diffusion.parametrization import V
from ldm.diffusion.schedule import ScaledLinear
from ldm.nn.conditioning import Conditioning

B = 3
CONDITIONAL = Conditioning(vector=torch.linspace(1, 2, B)[:, None], context=torch.ones(B, 2, 4))
UNCONDITIONAL = Conditioning(vector=torch.zeros(B, 1), context=torch.zeros(B, 2, 4))
X, SIGMA = torch.linspace(-1, 1, B * 6).reshape(B, 2, 3), torch.tensor([0.1, 1.0, 9.0])


class CountingNetwork:
    """x0 = tanh(x / (1 + sigma) + vector), and the batch sizes that it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        self.batches.append(len(x))
        return torch.tanh(x / (1 + sigma[:, None, None]) + cond.vector[:, :, None])


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_goes_from_unconditional_towards_conditional_in_one_call(scale: float) -> None:
    network = CountingNetwork()
    denoised = guided(network, CONDITIONAL, UNCONDITIONAL, scale)(X, SIGMA)
    assert network.batches == [2 * B]
    with_it, without = network(X, SIGMA, CONDITIONAL), network(X, SIGMA, UNCONDITIONAL)
    torch.testing.assert_close(denoised, (1 - scale) * without + scale * with_it)


@pytest.mark.parametrize(("unconditional", "scale"), [(UNCONDITIONAL, 1.0), (None, 1.0), (None, 7.5)])
def test_without_anything_to_guide_by_the_network_runs_once(unconditional: Conditioning | None, scale: float) -> None:
    network = CountingNetwork()
    denoised = guided(network, CONDITIONAL, unconditional, scale)(X, SIGMA)
    assert network.batches == [B]
    assert torch.equal(denoised, network(X, SIGMA, CONDITIONAL))


def test_guiding_x0_is_guiding_what_the_network_says() -> None:
    """Ho & Salimans guide eps; the answer of any parametrization may be guided, since D is affine in it."""
    diffusion, network = Diffusion(ScaledLinear(), V()), CountingNetwork()

    def guided_network(x: Tensor, noise_level: Tensor, cond: Conditioning) -> Tensor:
        without = network(x, noise_level, UNCONDITIONAL)
        return without + 4.0 * (network(x, noise_level, cond) - without)

    inside = diffusion.denoise(guided_network, X, SIGMA, CONDITIONAL)
    outside = guided(
        lambda x, sigma, cond: diffusion.denoise(network, x, sigma, cond), CONDITIONAL, UNCONDITIONAL, 4.0
    )(X, SIGMA)
    torch.testing.assert_close(outside, inside)
