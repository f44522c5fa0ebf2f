from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ldm.clip.image import ViTConfig
from ldm.clip.model import CLIPConfig
from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import ByteBPEConfig
from ldm.conditioning.transformer import TransformerConditionerConfig
from ldm.denoiser import LevelSpec, UNetConfig
from ldm.nn.conditioning import Conditioning
from ldm.nn.gradient_checkpointing import set_gradient_checkpointing
from ldm.nn.lora import new_lora
from ldm.vae import AutoencoderKLConfig
from tests.tiny import TOKENIZER, tiny_model


@dataclass
class Case:
    network: nn.Module
    loss: Callable[[], Tensor]


def unet(*shares: float) -> Case:
    levels = (LevelSpec(16, 1), LevelSpec(32, 2, depth=2))
    network = UNetConfig(levels, context_width=8, vector_width=8, heads=2, groups=4, dropout=0.2).build()
    if shares:
        network.set_token_routing(shares)
    x, noise_level = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    cond = Conditioning(torch.randn(2, 3, 8), mask, torch.randn(2, 8))
    return Case(network, lambda: network(x, noise_level, cond).square().mean())


def unet_with_token_routing() -> Case:
    return unet(0, 0.5)


def vae() -> Case:
    network = AutoencoderKLConfig((8, 16), blocks=1, groups=4).build()
    image = torch.randn(2, 3, 16, 16)
    return Case(network, lambda: network.decode(network.encode(image).mode).square().mean())


def clip() -> Case:
    text = TextTowerConfig(300, 12, width=16, layers=3, heads=2)
    network = CLIPConfig(text, ViTConfig(16, 8, width=16, layers=3, heads=2), embed_dim=16).build()
    image, tokens = torch.randn(2, 3, 16, 16), TOKENIZER(["a red apple", "a blue car"])
    return Case(network, lambda: sum(each.sum() for each in network(image, tokens)))  # type: ignore[misc]


def transformer() -> Case:
    config = TransformerConditionerConfig(width=16, layers=3, heads=2, tokenizer=ByteBPEConfig(300, 12))
    network = config.with_tokenizer(lambda *_: TOKENIZER).build()
    return Case(network, lambda: network({"text": ["a red apple", "a blue car"]}).context.square().mean())


CASES = [unet, unet_with_token_routing, vae, clip, transformer]


def randomized(case: Case) -> Case:
    """Return the case with new networks that are not the identity at the beginning."""
    for parameter in case.network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return case


def gradients(case: Case, checkpointing: bool, seed: int = 3) -> tuple[Tensor, list[Tensor]]:
    set_gradient_checkpointing(case.network, checkpointing)
    torch.manual_seed(seed)
    loss = case.loss()
    trained = [parameter for parameter in case.network.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.detach(), [torch.zeros(()) if each is None else each for each in found]


def assert_equal(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert any(each.any() for each in one[1])
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.equal(a, b)


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Return the bytes of the tensors that autograd keeps for the backward pass, without parameters."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(each.untyped_storage().nbytes() for each in kept.values())


@pytest.mark.parametrize("make", CASES)
def test_loss_and_gradients_are_bitwise_the_same(make: Callable[[], Case]) -> None:
    case = randomized(make())
    assert_equal(gradients(case, False), gradients(case, True))


@pytest.mark.parametrize("make", CASES)
def test_loss_and_gradients_are_the_same_under_autocast(make: Callable[[], Case]) -> None:
    case = randomized(make())
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(gradients(case, False), gradients(case, True))


@pytest.mark.parametrize("make", CASES)
def test_fewer_activations_are_kept(make: Callable[[], Case]) -> None:
    case = randomized(make())
    set_gradient_checkpointing(case.network, False)
    without = saved_bytes(case.loss)
    set_gradient_checkpointing(case.network, True)
    assert saved_bytes(case.loss) < 0.6 * without


def test_dropout_is_the_same_in_both_passes() -> None:
    case = randomized(unet())
    one, other = gradients(case, True), gradients(case, True, seed=4)
    assert not torch.equal(one[0], other[0])
    assert_equal(gradients(case, True), one)


def test_nothing_is_kept_without_gradients() -> None:
    case = randomized(unet())
    case.network.eval()
    with torch.no_grad():
        expected = case.loss()
        set_gradient_checkpointing(case.network, True)
        assert torch.equal(case.loss(), expected)


def test_adapters_get_the_same_gradients() -> None:
    model = tiny_model()
    model.adapters.add(model, new_lora(model, rank=2))
    x, noise_level, cond = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), Conditioning(torch.randn(2, 3, 16))
    model.requires_grad_(False)
    model.adapters.requires_grad_(True)
    case = randomized(Case(model, lambda: model.denoiser(x, noise_level, cond).square().mean()))
    assert_equal(gradients(case, False), gradients(case, True))


@pytest.mark.slow
def test_a_compiled_network_has_the_same_gradients() -> None:
    case = randomized(unet())
    case.network.eval()  # dropout draws other numbers where it is compiled
    plain = gradients(case, True)
    case.network.compile()
    compiled = gradients(case, True)
    torch.testing.assert_close(compiled, plain)
