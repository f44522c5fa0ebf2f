"""ControlNet and IP-Adapter as toys: what the U-Net and its adapters have to allow for either, each in a few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from ldm.config import from_dict
from ldm.denoiser import LevelSpec, UNet, UNetConfig, UNetEncoder
from ldm.denoiser.unet import set_to_zero
from ldm.nn.adapters import Adapter, AdapterLayer, Adapters
from ldm.nn.attention import CrossAttention
from ldm.nn.conditioning import Conditioning, Context
from tests.denoiser.peers import randomize

LEVELS = [{"width": 8, "blocks": 1, "depth": 1}, {"width": 16, "blocks": 2, "depth": 1}]
X, LEVEL, TARGET = torch.randn(2, 4, 6, 10), torch.tensor([3.0, 700.0]), torch.randn(2, 4, 6, 10)
COND = Conditioning(context=torch.randn(2, 5, 12), vector=torch.randn(2, 3))


@pytest.fixture
def unet() -> UNet:
    config = {"levels": LEVELS, "heads": 2, "groups": 4, "context_width": 12, "vector_width": 3}
    return randomize(from_dict(UNetConfig, config).build())


def train(parameters: Sequence[nn.Parameter], output: Callable[[], Tensor]) -> tuple[float, float]:
    """Loss against the target, before and after a few steps of gradient descent."""
    losses = []
    for _ in range(8):
        loss = (output() - TARGET).square().mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= 1e-3 * gradient / (gradient.norm() + 1e-6)
        losses.append(loss.item())
    return losses[0], losses[-1]


class ControlNet(nn.Module):
    """A copy of the encoder that also sees an image; zero convolutions lead from it to the skips and the middle."""

    def __init__(self, unet: UNet, channels: int):
        super().__init__()
        self.encoder = unet.copy_encoder()
        widths = [*self.encoder.skip_widths, self.encoder.skip_widths[-1]]
        self.hint = nn.Conv2d(channels, unet.config.in_channels, 1)
        self.zeros = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        for layer in (self.hint, *self.zeros):
            set_to_zero(layer)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Conditioning, image: Tensor) -> list[Tensor]:
        features = self.encoder(x + self.hint(image), noise_level, cond)
        return [zero(h) for zero, h in zip(self.zeros, [*features.skips, features.middle], strict=True)]


def test_a_controlnet_changes_nothing_at_first_and_is_trained_apart_from_the_network(unet: UNet) -> None:
    image, before = torch.randn(2, 3, 6, 10), copy.deepcopy(unet.state_dict())
    control = ControlNet(unet, channels=3)
    plain = unet(X, LEVEL, COND)

    def output(image: Tensor = image) -> Tensor:
        return cast(Tensor, unet(X, LEVEL, COND, residuals=control(X, LEVEL, COND, image)))

    assert torch.equal(output(), plain)
    first, last = train(list(control.parameters()), output)
    assert last < first
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not torch.equal(output(), output(-image))
    assert not torch.equal(control.encoder.conv_in.weight, unet.conv_in.weight)


def test_the_encoder_is_the_first_half_of_the_network(unet: UNet) -> None:
    """With the names and values of its weights, and the outputs that the decoder gets."""
    encoder = unet.copy_encoder()
    assert type(encoder) is UNetEncoder
    state, names = encoder.state_dict(), list(unet.state_dict())
    assert list(state) == [name for name in names if not name.startswith(("up.", "norm_out.", "conv_out."))]
    assert all(torch.equal(tensor, unet.state_dict()[name]) for name, tensor in state.items())
    features = encoder(X, LEVEL, COND)
    assert [skip.shape[1] for skip in features.skips] == encoder.skip_widths
    x = features.middle
    for block in unet.up:
        x = block(x, features.embedding, COND, features.skips.pop())
    out = unet.conv_out(nn.functional.silu(unet.norm_out(x)))
    assert torch.equal(out, unet(X, LEVEL, COND))
    assert unet.half().copy_encoder().conv_in.weight.dtype == torch.float16


def test_each_residual_is_added_to_its_skip_and_the_last_to_the_middle(unet: UNet) -> None:
    features = unet.copy_encoder()(X, LEVEL, COND)
    widths = [*features.skips, features.middle]
    plain = unet(X, LEVEL, COND)
    for i, each in enumerate(widths):
        residuals = [torch.zeros_like(other) for other in widths]
        residuals[i] = torch.ones_like(each)
        assert not torch.equal(unet(X, LEVEL, COND, residuals=residuals), plain)
    with pytest.raises(ValueError, match="zip"):
        unet(X, LEVEL, COND, residuals=[torch.zeros_like(each) for each in widths[:-1]])


class ImagePrompt(AdapterLayer):
    """Keys and values of a second context for a cross-attention; what is attended to there is added."""

    def __init__(self, attention: CrossAttention, width: int):
        super().__init__()
        inner = attention.to_q.out_features
        self.to_k, self.to_v = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        set_to_zero(self.to_v)

    def forward(self, layer: nn.Module, x: Tensor, cond: Conditioning) -> Tensor:
        assert isinstance(layer, CrossAttention)
        image = cond.contexts["image"]
        attended = layer.attend(layer.to_q(x), self.to_k(image.states), self.to_v(image.states), image.mask)
        return self.scale * nn.functional.linear(attended, layer.to_out.weight)


def test_an_ip_adapter_changes_nothing_at_first_and_attends_to_a_named_context(unet: UNet) -> None:
    names, states = list(unet.state_dict()), torch.randn(2, 7, 9)
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    cond = replace(COND, contexts={"image": Context(states, mask)})
    plain = unet(X, LEVEL, COND)
    layers = {name: ImagePrompt(each, 9) for name, each in unet.named_modules() if isinstance(each, CrossAttention)}
    adapters = Adapters()
    adapters.add(unet, Adapter("ip", layers))
    assert torch.equal(unet(X, LEVEL, cond), plain)
    assert list(unet.state_dict()) == names
    first, last = train(list(adapters.parameters()), lambda: cast(Tensor, unet(X, LEVEL, cond)))
    assert last < first
    trained = unet(X, LEVEL, cond)
    other = torch.where(mask[..., None], states, 100.0)
    assert torch.equal(unet(X, LEVEL, replace(COND, contexts={"image": Context(other, mask)})), trained)
    assert not torch.equal(unet(X, LEVEL, replace(COND, contexts={"image": Context(-states, mask)})), trained)
    adapters.set_scale(unet, "ip", 0.0)
    torch.testing.assert_close(unet(X, LEVEL, cond), plain)
    adapters.remove(unet, "ip")
    assert torch.equal(unet(X, LEVEL, COND), plain)


def test_levels_give_the_widths_of_the_skips() -> None:
    config = UNetConfig(levels=(LevelSpec(8, 2), LevelSpec(16, 1)), heads=1, groups=4)
    assert UNetEncoder(config).skip_widths == [8, 8, 8, 8, 16]
