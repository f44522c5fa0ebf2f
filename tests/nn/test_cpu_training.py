"""What is computed differently when a network is trained on a CPU gives the gradients of the plain operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import SHORT, Attention, scaled_dot_product_attention
from ldm.nn.group_norm import GroupNorm, _GroupNormInFP32


def gradients(norm: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Return output and gradients of input, weight and bias, in double precision."""
    x = x.detach().requires_grad_()
    y = norm(x)
    y.backward(upstream.to(y))
    return [each.double() for each in (y.detach(), x.grad, norm.weight.grad, norm.bias.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_group_norm_has_the_gradients_of_torch(width: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(2, 3 * width, 5, 4) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(x.shape).contiguous(memory_format=torch.channels_last).to(dtype)
    norm = GroupNorm(3, 3 * width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    reference = nn.GroupNorm(3, 3 * width).double()
    reference.load_state_dict(norm.state_dict())
    found, expected = gradients(norm, x, upstream), gradients(reference, x.double(), upstream)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < (1e-5 if dtype == torch.float32 else 4e-3)
    y = norm(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_backward_pass_of_a_narrow_group_norm_is_the_derivative() -> None:
    x = torch.randn(2, 4, 3, 2, dtype=torch.double).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(4, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(_GroupNormInFP32.apply, (x, weight, bias, 2, 1e-5))


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_weights_of_a_group_norm_may_have_any_dtype(weights: str) -> None:
    for width in (1, 8):
        norm = GroupNorm(2, 2 * width).to(getattr(torch, weights))
        x = torch.randn(2, 2 * width, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
        norm(x).sum().backward()
        assert norm.weight.grad.dtype == norm.weight.dtype


@pytest.mark.parametrize("causal", [False, True])
def test_bf16_attention_to_few_keys_is_more_precise_in_training(causal: bool) -> None:
    q, k, v = (torch.randn(2, 2, 6, 8).bfloat16() for _ in range(3))
    upstream = torch.randn(2, 2, 6, 8).bfloat16()

    def errors(attention: object, *inputs: Tensor) -> list[float]:
        found, expected = (
            [each.detach().requires_grad_() for each in inputs],
            [each.detach().double().requires_grad_() for each in inputs],
        )
        attention(*found, is_causal=causal).backward(upstream)  # type: ignore[operator]
        F.scaled_dot_product_attention(*expected, is_causal=causal).backward(upstream.double())
        return [
            float((a.grad - b.grad).norm() / b.grad.norm())
            for a, b in zip(found, expected, strict=True)  # type: ignore[union-attr,operator]
        ]

    def ours(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return scaled_dot_product_attention(q, k, v, causal=is_causal)

    assert max(errors(ours, q, k, v)) <= 1.1 * max(errors(F.scaled_dot_product_attention, q, k, v)) < 0.02


@pytest.mark.parametrize("keys", [4, SHORT + 1])
def test_attention_under_autocast_keeps_its_dtype_and_mask(keys: int) -> None:
    attention = Attention(8, 2)
    x, context = torch.randn(2, 3, 8), torch.randn(2, keys, 8)
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[:, 2:] = False
    with torch.autocast("cpu", torch.bfloat16):
        masked, cut = attention(x, context, mask), attention(x, context[:, :2])
    assert masked.dtype == torch.bfloat16
    torch.testing.assert_close(masked, cut, rtol=0.02, atol=0.02)
