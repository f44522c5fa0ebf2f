"""Formulations for inference on a CPU, compared with the layers that they replace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.nn import conv, cpu_attention, inference, residual
from ldm.nn import winograd as ldm_winograd
from ldm.nn.adapters import attach
from ldm.nn.attention import GEGLU, Attention, scaled_dot_product_attention
from ldm.nn.conv import Conv1x1, Conv3x3, conv_by_product
from ldm.nn.cpu_attention import padded_attention, sigmoid_attention
from ldm.nn.inference import Linear, supports_onednn_linear
from ldm.nn.lora import LoRALayer
from ldm.nn.residual import ResidualBlock, Upsample
from ldm.nn.winograd import winograd

needs_bf16 = pytest.mark.skipif(not supports_onednn_linear(torch.bfloat16), reason="needs AVX-512 bf16")


@pytest.mark.parametrize("count", [1, 2000, 2**24])  # a tile, some and all of the tiles at once
@pytest.mark.parametrize(
    ("b", "c", "d", "h", "w"), [(2, 5, 3, 8, 4), (1, 4, 4, 4, 2), (1, 2, 3, 44, 7), (1, 3, 2, 12, 1)]
)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_winograd_equals_the_direct_convolution(
    b: int,
    c: int,
    d: int,
    h: int,
    w: int,
    dtype: torch.dtype,
    error: float,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ldm.nn.winograd.BYTES", count)
    x = torch.randn(b, c, h, w).to(dtype, memory_format=torch.channels_last)
    weight, bias = torch.randn(d, c, 3, 3).to(dtype), torch.randn(d).to(dtype)
    for each in (bias, None):
        y = winograd(x, weight, each)
        exact = F.conv2d(x.double(), weight.double(), None if each is None else each.double(), padding=1)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (y - exact).square().mean().sqrt() < error * exact.square().mean().sqrt()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-6), (torch.bfloat16, 4.5e-3)])
def test_the_error_of_winograd_is_that_of_the_dtype(dtype: torch.dtype, error: float) -> None:
    x, weight = torch.randn(1, 256, 16, 16).to(dtype), torch.randn(32, 256, 3, 3).to(dtype)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert (winograd(x, weight, None) - exact).std() < error * exact.std()


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), pytest.param(torch.bfloat16, 1e-2, marks=needs_bf16)]
)
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 6, 9, 9))), width=st.integers(1, 5), stride=st.integers(1, 3)
)
def test_a_convolution_as_a_product_equals_the_direct_one(
    dtype: torch.dtype, error: float, shape: tuple[int, int, int, int], width: int, stride: int
) -> None:
    x = torch.randn(shape).to(dtype)
    weight, bias = torch.randn(width, shape[1], 3, 3).to(dtype), torch.randn(width).to(dtype)
    for each in (bias, None):
        y = conv_by_product(x, weight, each, stride)
        exact = F.conv2d(x.double(), weight.double(), None if each is None else each.double(), stride, padding=1)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), exact, atol=error * exact.abs().max().item(), rtol=error)


@needs_bf16
@pytest.mark.parametrize("amx", [False, True])
def test_convolutions_of_small_images_are_products_in_bf16_with_amx(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, linear = [], conv.onednn_linear
    monkeypatch.setattr(inference, "has_amx", lambda: amx)
    monkeypatch.setattr(conv, "onednn_linear", lambda x, *args: sizes.append(x.shape[-1]) or linear(x, *args))
    layers = Conv3x3(512, 512), Conv3x3(512, 512, stride=2), Conv1x1(512, 512), Conv3x3(64, 64)
    sizes_of_images = 8, 16, 16, 32
    for layer, size in zip(layers, sizes_of_images, strict=True):
        layer.to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.randn(2, layer.in_channels, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        expected = layer(x)  # with gradients: the layer of torch
        with torch.inference_mode():
            y = layer(x)
        torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert sizes == ([9 * 512, 9 * 512, 512] if amx else [])


@pytest.mark.parametrize(
    "make", [lambda: Linear(256, 512), lambda: Linear(256, 512, bias=False), lambda: GEGLU(256, 256)]
)
def test_linear_layers_are_the_same_with_and_without_gradients(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(2, 128, 256)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
        half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("make", [lambda: Linear(256, 512), lambda: GEGLU(256, 256).proj])
def test_linear_layers_call_their_adapters(make: Callable[[], nn.Linear]) -> None:
    layer, x = make().requires_grad_(False), torch.randn(2, 128, 256)
    down, up = torch.randn(4, 256) / 16, torch.randn(512, 4)
    with torch.inference_mode():
        plain = layer(x)
        attach(layer, LoRALayer(down, up, 4))
        torch.testing.assert_close(layer(x), plain + x @ down.T @ up.T, atol=1e-4, rtol=1e-4)
        attach(layer)
        torch.testing.assert_close(layer(x), plain)
        layer.weight.data = layer.weight + up @ down
        torch.testing.assert_close(layer(x), plain + x @ down.T @ up.T, atol=1e-4, rtol=1e-4)


def load(layer: nn.Conv2d, weight: Tensor) -> None:
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight))})


def assign(layer: nn.Conv2d, weight: Tensor) -> None:
    layer.weight.data, layer.bias = weight, None


def copy_in_place(layer: nn.Conv2d, weight: Tensor) -> None:
    layer.weight.data.copy_(weight)
    layer.bias.data.zero_()


def add_lora(layer: nn.Conv2d, weight: Tensor) -> None:
    change = (weight - layer.weight).detach()
    layer.bias.data.zero_()
    rank = change.shape[0]
    attach(layer, LoRALayer(change, torch.eye(rank), rank))


@pytest.mark.parametrize("change", [load, assign, copy_in_place, add_lora])
def test_changed_weights_are_used_at_once(change: Callable[[nn.Conv2d, Tensor], None]) -> None:
    layer, x = Conv3x3(320, 320).requires_grad_(False), torch.randn(1, 320, 64, 64)
    new = torch.randn_like(layer.weight) / 50
    with torch.inference_mode():
        layer(x)
    change(layer, new)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.conv2d(x, new, padding=1), atol=1e-4, rtol=1e-4)


def test_a_residual_block_is_the_same_with_and_without_gradients() -> None:
    block, x = ResidualBlock(320, 320), torch.randn(1, 320, 64, 64)
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
        block, x = block.to(torch.bfloat16), x.bfloat16()
        torch.testing.assert_close(block(x).float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("keys", [1, 15, 77])
@pytest.mark.parametrize("masked", [False, True])
def test_padded_keys_change_nothing(keys: int, masked: bool) -> None:
    q, k, v = torch.randn(2, 3, 300, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    mask = torch.arange(keys) <= torch.tensor([[0], [keys // 2]]) if masked else None
    mask = None if mask is None else mask[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(padded_attention(q, k, v, mask), expected)


def test_few_keys_are_padded_for_many_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cpu_attention, "padded_attention", lambda *args: calls.append(1) or padded_attention(*args))
    for queries, keys, times in ((300, 77, 1), (300, 80, 0), (200, 77, 0), (300, 301, 0)):
        calls.clear()
        q, k = torch.randn(1, 2, queries, 8), torch.randn(1, 2, keys, 8)
        with torch.inference_mode():
            out = scaled_dot_product_attention(q, k, k)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, k))
        assert len(calls) == times


@needs_bf16
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.5])
def test_sigmoid_attention_is_attention_to_the_rounding_of_bf16(scale: float) -> None:
    q, k, v = torch.randn(3, 1, 2, 600, 40)
    q, k, v = (scale * q).bfloat16(), (scale * k + 3).bfloat16(), v.bfloat16()
    out = sigmoid_attention(q, k, v)
    assert out is not None
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch_error = (F.scaled_dot_product_attention(q, k, v) - exact).norm() / exact.norm()
    error = (out - exact).norm() / exact.norm()
    assert error < 0.015
    assert error < 6 * torch_error


@needs_bf16
def test_logits_out_of_its_range_are_left_to_torch() -> None:
    q = 10 * torch.randn(1, 1, 1024, 40).bfloat16()
    assert sigmoid_attention(q, q, q) is None
    with torch.inference_mode():
        torch.testing.assert_close(scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))


@needs_bf16
def test_attention_modules_use_it_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(inference, "has_amx", lambda: False)
    monkeypatch.setattr(cpu_attention, "sigmoid_attention", lambda *args: calls.append(1) or sigmoid_attention(*args))
    attention = Attention(16, 2).to(torch.bfloat16)
    x = torch.randn(1, 1024, 16).bfloat16()
    expected = attention(x)
    assert not calls
    with torch.inference_mode():
        out = attention(x)
    assert calls
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=5e-2)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_products_in_bf16_are_for_cpus_without_amx(
    dtype: torch.dtype, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: calls.append(function.__name__) or function(*args)

    monkeypatch.setattr(inference, "has_amx", lambda: amx)
    for module, function in ((residual, residual.upsample_conv), (ldm_winograd, winograd)):
        monkeypatch.setattr(module, function.__name__, counted(function))
    with torch.inference_mode():
        Conv3x3(160, 160).to(dtype)(torch.randn(1, 160, 64, 64, dtype=dtype))
        Upsample(4).to(dtype)(torch.randn(1, 4, 32, 32, dtype=dtype))
        Upsample(4).to(dtype)(torch.randn(1, 4, 64, 64, dtype=dtype))
    fast_bf16 = amx and dtype == torch.bfloat16
    assert calls == (["upsample_conv"] if fast_bf16 else ["winograd", "upsample_conv", "upsample_conv"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_are_one_graph(dtype: torch.dtype) -> None:
    """A question to the CPU inside the graph would break it."""
    image, tokens = torch.randn(1, 16, 32, 32, dtype=dtype), torch.randn(1, 1024, 16, dtype=dtype)
    layers = (Conv3x3(16, 16), image), (Conv1x1(16, 16), image), (Upsample(16), image), (Attention(16, 2), tokens)
    for layer, x in layers:
        with torch.inference_mode():
            expected = layer.to(dtype)(x)
            compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, expected, atol=1e-2, rtol=5e-2)
