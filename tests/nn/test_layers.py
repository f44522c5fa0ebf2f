from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from ldm.nn.attention import GEGLU, Attention
from ldm.nn.embeddings import sinusoidal
from ldm.nn.residual import ResidualBlock, Upsample, upsample_conv


@pytest.mark.parametrize("width", [8, 32])
def test_sinusoids_are_those_of_diffusers(width: int) -> None:
    levels = torch.tensor([0.0, 0.3, 17.0, 999.0])
    expected = get_timestep_embedding(levels, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoidal(levels, width), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_torch(causal: bool) -> None:
    peer = nn.MultiheadAttention(12, 3, batch_first=True)
    attention = Attention(12, 3, bias=True)
    weight, bias = peer.in_proj_weight.chunk(3), peer.in_proj_bias.chunk(3)
    for i, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):
        layer.load_state_dict({"weight": weight[i], "bias": bias[i]})
    attention.to_out.load_state_dict(peer.out_proj.state_dict())
    x = torch.randn(2, 5, 12)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected = peer(x, x, x, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(attention(x, causal=causal), expected)


def test_a_masked_token_is_not_attended_to() -> None:
    attention = Attention(8, 2, context_width=6)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    masked = attention(x, context, mask)
    torch.testing.assert_close(masked[:1], attention(x[:1], context[:1, :2]))
    torch.testing.assert_close(masked[1:], attention(x[1:], context[1:]))


def test_geglu_multiplies_the_value_with_the_gelu_of_the_gate() -> None:
    layer = GEGLU(1, 1)
    layer.proj.load_state_dict({"weight": torch.tensor([[1.0], [0.0]]), "bias": torch.tensor([0.0, 2.0])})
    exact = 2.0 * 0.5 * (1 + math.erf(2.0 / math.sqrt(2.0)))
    torch.testing.assert_close(layer(torch.tensor([[3.0]])), torch.tensor([[3.0 * exact]]))


def test_the_embedding_is_added_a_channel() -> None:
    """With the second convolution as the identity, and norms aside, its effect is the same at each position."""
    block = ResidualBlock(4, 4, embedding_width=3, groups=1)
    x = torch.randn(2, 4, 1, 1).expand(2, 4, 6, 6)
    nn.init.dirac_(block.conv1.weight)
    nn.init.dirac_(block.conv2.weight)
    moved = block(x, torch.randn(2, 3)) - block(x, torch.zeros(2, 3))
    torch.testing.assert_close(moved, moved[:, :, :1, :1].expand_as(moved))
    assert moved.abs().max() > 1e-3


def test_upsampling_repeats_pixels_to_the_size_that_is_asked_for() -> None:
    layer = Upsample(1)
    nn.init.dirac_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert torch.equal(layer(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert layer(x, (3, 5)).shape == (1, 1, 3, 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_upsampling_in_phases_equals_upsampling_before_the_convolution(dtype: torch.dtype, tolerance: float) -> None:
    layer = Upsample(8)
    x = torch.randn(2, 8, 16, 13)
    expected = layer.conv(F.interpolate(x, scale_factor=2.0))
    with torch.no_grad():
        result = layer.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=tolerance)


def test_upsampling_in_phases_has_the_gradients_of_upsampling_before_the_convolution() -> None:
    layer, x, upstream = Upsample(8), torch.randn(2, 8, 16, 13, requires_grad=True), torch.randn(2, 8, 32, 26)
    inputs = (x, layer.conv.weight, layer.conv.bias)
    ours, plain = layer(x), layer.conv(F.interpolate(x, scale_factor=2.0))
    found, expected = (torch.autograd.grad(each, inputs, upstream) for each in (ours, plain))
    torch.testing.assert_close((ours, *found), (plain, *expected), atol=2e-4, rtol=1e-4)


def test_upsampling_in_phases_uses_the_current_weights() -> None:
    layer, x = Upsample(4), torch.randn(1, 4, 16, 16)
    with torch.inference_mode():
        layer(x)
        layer.conv.weight.mul_(2)
        layer.conv.bias.zero_()
        expected = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.conv.weight, padding=1)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_upsampling_calls_a_convolution_that_has_hooks() -> None:
    layer, calls = Upsample(4), []
    layer.conv.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    with torch.no_grad():
        layer(torch.randn(1, 4, 16, 16))
    assert calls == [(1, 4, 32, 32)]


def test_upsample_conv_without_bias() -> None:
    x, weight = torch.randn(1, 3, 5, 4), torch.randn(2, 3, 3, 3)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    torch.testing.assert_close(upsample_conv(x, weight, None), expected, atol=1e-5, rtol=1e-5)
