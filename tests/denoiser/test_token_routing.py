"""Token routing: positions that skip the transformer blocks of a U-Net in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ldm.denoiser import LevelSpec, UNet, UNetConfig
from ldm.denoiser.spatial_transformer import SpatialTransformer
from ldm.errors import ConfigError
from ldm.nn.attention import AttentionOptions
from ldm.nn.conditioning import Conditioning
from ldm.nn.token_routing import random_tokens, route_tokens, shares_by_level

COND = Conditioning(torch.randn(2, 3, 8), torch.tensor([[True, True, False], [True, True, True]]))
NOISE_LEVEL = torch.tensor([10.0, 500.0])


def randomized(network: nn.Module) -> Any:
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def unet(*shares: float) -> UNet:
    """A U-Net with attention at two levels of three, and in the middle."""
    torch.manual_seed(0)
    levels = (LevelSpec(16, 1), LevelSpec(16, 1, depth=2), LevelSpec(32, 1, depth=1))
    network: UNet = randomized(UNetConfig(levels, context_width=8, heads=2, groups=4).build())
    if shares:
        network.set_token_routing(shares)
    return network


def evaluated(network: UNet, options: AttentionOptions | None = None) -> Tensor:
    torch.manual_seed(1)
    return network(torch.randn(2, 4, 16, 16), NOISE_LEVEL, COND, options)


@pytest.mark.parametrize(("n", "share", "count"), [(16, 0.5, 8), (15, 0.5, 8), (64, 0.25, 48), (4, 0.99, 1), (9, 0, 9)])
def test_the_share_is_exact_for_each_sample(n: int, share: float, count: int) -> None:
    kept = random_tokens(torch.zeros(5, n, 2), share)
    assert kept.shape == (5, count)
    assert all(len(set(row)) == count and set(row) <= {*range(n)} for row in kept.tolist())


def test_samples_have_choices_of_their_own_and_all_tokens_the_same_chance() -> None:
    kept = random_tokens(torch.zeros(2000, 16, 1), 0.75)
    assert len({frozenset(row) for row in kept.tolist()}) > 1000
    assert (torch.bincount(kept.flatten(), minlength=16) / 2000 - 0.25).abs().max() < 0.05


def test_tokens_that_skip_are_unchanged_and_the_others_are_those_of_the_span_alone() -> None:
    """With gradients: those of the former are the identity, those of the latter the span's."""
    x, linear = torch.randn(3, 10, 4, requires_grad=True), nn.Linear(4, 4)

    def span(tokens: Tensor) -> Tensor:  # that mixes tokens, as attention does
        return linear(tokens) + tokens.mean(dim=1, keepdim=True)

    torch.manual_seed(2)
    kept = random_tokens(x, 0.3)
    torch.manual_seed(2)
    found = route_tokens(x, 0.3, span)
    expected = x.clone()
    for row, places in enumerate(kept):
        expected[row, places] = span(x[row : row + 1, places])[0]
    skips = torch.ones(3, 10, dtype=torch.bool).scatter(1, kept, False)
    assert skips.sum(1).tolist() == [3, 3, 3]
    assert torch.equal(found[skips], x[skips])
    torch.testing.assert_close(found, expected)
    weight = torch.randn(3, 10, 4)
    gradients, references = (
        torch.autograd.grad((y * weight).sum(), (x, *linear.parameters())) for y in (found, expected)
    )
    torch.testing.assert_close(gradients, references)
    assert torch.equal(gradients[0][skips], weight[skips])


@pytest.mark.parametrize("linear", [True, False])
def test_a_spatial_transformer_routes_between_its_projections(linear: bool) -> None:
    torch.manual_seed(0)
    layer = randomized(SpatialTransformer(16, 2, 2, 8, linear, groups=4, dropout=0.0)).train()
    layer.token_routing = 0.5
    seen: dict[str, Tensor] = {}

    def tokens(x: Tensor) -> Tensor:
        return x if linear else x.flatten(2).transpose(1, 2)

    layer.proj_in.register_forward_hook(lambda _, inputs, output: seen.update(before=tokens(output)))
    layer.proj_out.register_forward_hook(lambda _, inputs, output: seen.update(after=tokens(inputs[0])))
    x = torch.randn(2, 16, 4, 6).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)
    layer(x, COND)
    torch.manual_seed(1)
    kept = random_tokens(seen["before"], 0.5)
    assert kept.shape == (2, 12)
    skips = torch.ones(2, 24, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(seen["after"][skips], seen["before"][skips])
    for row, places in enumerate(kept):
        chosen = seen["before"][row : row + 1, places]
        for block in layer.blocks:
            chosen = block(chosen, COND[row : row + 1])
        torch.testing.assert_close(seen["after"][row : row + 1, places], chosen)


def test_the_levels_have_shares_of_their_own_and_the_middle_keeps_all() -> None:
    network, seen = unet(0, 0.5, 0.25).train(), {}
    for name, module in network.named_modules():
        if name.endswith("blocks.0"):
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.shape[1]}))
    evaluated(network)
    counts = {name.partition(".transformer")[0]: count for name, count in seen.items()}
    assert counts == {"down.2": 32, "down.4": 12, "middle.0": 16, "up.0": 12, "up.1": 12, "up.2": 32, "up.3": 32}


@pytest.mark.parametrize("options", [None, AttentionOptions(token_merging=0.5)])
def test_in_evaluation_mode_it_changes_nothing(options: AttentionOptions | None) -> None:
    expected = evaluated(unet().eval(), options)
    assert torch.equal(evaluated(unet(0, 0.5, 0.5).eval(), options), expected)
    assert not torch.allclose(evaluated(unet(0, 0.5, 0.5).train()), evaluated(unet().train()))


def test_all_parameters_get_a_gradient() -> None:
    network = unet(0, 0.9, 0.9).train()
    evaluated(network).square().mean().backward()
    assert [name for name, each in network.named_parameters() if each.grad is None or not each.grad.any()] == []


def test_it_computes_in_the_precision_of_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluated(unet(0, 0.5, 0.5).train())
    torch.testing.assert_close(found.float(), evaluated(unet(0, 0.5, 0.5).train()), atol=0.1, rtol=0.1)


def test_a_compiled_transformer_routes_in_one_graph() -> None:
    layer = randomized(SpatialTransformer(16, 1, 2, 8, True, groups=4, dropout=0.0)).train()
    layer.token_routing = 0.5
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)

    def routed() -> Tensor:
        torch.manual_seed(1)
        output: Tensor = layer(x, COND)
        return output

    expected = routed()
    torch._dynamo.reset()
    counter = CompileCounter()
    layer.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(routed(), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("given", "depths", "message"),
    [
        (1.0, (0, 1), r"must be in \[0, 1\), not 1\.0"),
        (-0.1, (0, 1), r"must be in \[0, 1\), not -0\.1"),
        ((0.0, 1.5), (0, 1), r"must be in \[0, 1\), not 1\.5"),
        (2.0, (), r"must be in \[0, 1\), not 2\.0"),
        (0.5, (), "needs a network with transformer blocks outside of its middle"),
        (0.5, (0, 0), "needs a network with transformer blocks outside of its middle"),
        ((0.5,), (0, 1), "has 1 values, but the network 2 levels"),
        ((0.5, 0.5), (0, 1), r"token_routing\[0\] is 0\.5, but the level has no transformer blocks"),
    ],
)
def test_shares_that_do_not_fit_are_refused(given: Any, depths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shares_by_level(given, depths)


@pytest.mark.parametrize(
    ("given", "depths", "expected"),
    [(0.5, (0, 2, 1), (0.0, 0.5, 0.5)), (0.0, (), ()), ((0.0, 0.5), (0, 1), (0.0, 0.5)), (0.0, (1, 1), (0.0, 0.0))],
)
def test_one_share_is_that_of_each_level_with_transformer_blocks(
    given: Any, depths: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    assert shares_by_level(given, depths) == expected
