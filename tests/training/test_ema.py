from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.training.ema import EMA


def ramp(decay: float, update: int) -> float:
    return min(decay, (1 + update) / (10 + update))


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.99])
def test_the_average_is_the_weighted_sum_of_all_weights(decay: float) -> None:
    """a_n = p_0 prod d_i + sum_k p_k (1 - d_k) prod_{i > k} d_i, the recursion solved; below 2/11 the ramp plays no part."""
    layer = nn.Linear(3, 2).double()
    ema, history = EMA(layer, decay), [layer.weight.detach().clone()]
    for _ in range(12):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        history.append(layer.weight.detach().clone())
        ema.update()
    decays = torch.tensor([ramp(decay, n) for n in range(1, 13)], dtype=torch.float64)
    later = torch.cat([decays.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    shares = torch.cat([torch.ones(1, dtype=torch.float64), 1 - decays]) * later
    assert abs(shares.sum() - 1) < 1e-12
    torch.testing.assert_close(ema.average["weight"], torch.einsum("k,kij->ij", shares, torch.stack(history)))


def test_no_decay_is_the_weights_themselves() -> None:
    layer = nn.Linear(2, 2)
    ema = EMA(layer, 0.0)
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update()
    torch.testing.assert_close(ema.average["weight"], layer.weight.detach(), rtol=0, atol=1e-6)


def test_the_weights_come_back_bitwise_whatever_happens() -> None:
    layer = nn.Linear(4, 4)
    ema = EMA(layer, 0.9)
    with torch.no_grad():
        layer.weight.mul_(3.0)
    ema.update()
    own, average = layer.weight.detach().clone(), ema.average["weight"].clone()
    parameter = layer.weight

    def validate() -> None:
        with ema.applied():
            assert torch.equal(layer.weight, average)
            assert layer.weight is parameter  # the optimizer's
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        validate()
    assert torch.equal(layer.weight, own)
    assert torch.equal(ema.average["weight"], average)


def test_what_is_frozen_is_not_averaged() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert set(EMA(network, 0.9).average) == {"0.weight", "0.bias"}


def test_a_restored_average_goes_on_as_if_nothing_had_happened() -> None:
    layer = nn.Linear(3, 3)
    ema = EMA(layer, 0.9)
    ema.update()
    other = EMA(layer, 0.9)
    other.load_state_dict(ema.state_dict())
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update()
    other.update()
    assert torch.equal(ema.average["weight"], other.average["weight"])
