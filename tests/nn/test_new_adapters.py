"""New adapters: trained, written and loaded, and of a kind of their own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.formats.lora import read_lora, write_lora
from ldm.nn.adapters import Adapter, AdapterLayer
from ldm.nn.conditioning import Conditioning
from ldm.nn.lora import new_lora
from tests.tiny import tiny_model


def test_a_new_one_is_trained_written_and_loaded(tmp_path: Path) -> None:
    """Only its weights change; what is learnt is in the file."""
    model = tiny_model(sampling={"num_inference_steps": 2})
    before = copy.deepcopy(model.state_dict())
    x, level, target = torch.randn(4, 4, 8, 8), torch.full((4,), 3.0), torch.randn(4, 4, 8, 8)
    cond = Conditioning(context=torch.randn(4, 5, 16))
    lora = new_lora(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(0))
    plain = model.denoiser(x, level, cond)
    model.adapters.add(model, lora)
    assert torch.equal(model.denoiser(x, level, cond), plain)
    optimizer = torch.optim.Adam(model.adapters.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = (model.denoiser(x, level, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is not None for parameter in lora.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())

    file, other = write_lora(tmp_path / "mine.safetensors", lora, model), tiny_model()
    other.adapters.add(other, read_lora(file, other))
    assert torch.equal(other.denoiser(x, level, cond), model.denoiser(x, level, cond))


def test_layers_of_a_new_one_are_named_by_a_pattern() -> None:
    model = tiny_model()
    lora = new_lora(model, layers=r"denoiser\.down\..*(conv1|to_q)")
    assert set(lora.layers) == {
        "denoiser.down.0.residual.conv1",
        "denoiser.down.0.transformer.blocks.0.attn1.to_q",
        "denoiser.down.0.transformer.blocks.0.attn2.to_q",
    }
    with pytest.raises(ConfigError, match="'nothing' matches no linear layer"):
        new_lora(model, layers="nothing")


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_a_kind_of_adapter_is_the_change_of_a_weight(merged: bool) -> None:
    """LoHa, the product of two low-rank matrices, entry by entry, acts on any layer by its ``delta`` alone."""

    class LoHaLayer(AdapterLayer):
        def __init__(self, shape: torch.Size, r: int = 2):
            super().__init__()
            self.pairs = nn.ParameterList(
                nn.Parameter(torch.randn(*sides)) for _ in range(2) for sides in ((shape[0], r), (r, shape[1:].numel()))
            )

        def delta(self, weight: Tensor) -> Tensor:
            a, b, c, d = (each.to(weight) for each in self.pairs)
            return ((a @ b) * (c @ d)).view_as(weight)

    model = tiny_model()
    paths = ["denoiser.down.0.residual.conv1", "denoiser.down.0.transformer.blocks.0.ff.0.proj"]
    layers = [model.get_submodule(path) for path in paths]
    inputs = [torch.randn(2, 16, 5, 3), torch.randn(2, 16)]
    plain = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    loha = Adapter("loha", {path: LoHaLayer(model.get_parameter(f"{path}.weight").shape) for path in paths})
    expected = []
    for path, x in zip(paths, inputs, strict=True):
        changed = copy.deepcopy(model.get_submodule(path))
        changed.get_parameter("weight").data += 0.5 * loha.layers[path].delta(changed.get_parameter("weight"))
        expected.append(changed(x))
    loha.scale, loha.merged = 0.5, merged
    model.adapters.add(model, loha)
    for layer, x, y, without in zip(layers, inputs, expected, plain, strict=True):
        torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)
        assert (y - without).abs().max() > 0.01
    model.adapters.remove(model)
    assert all(torch.equal(layer(x), y) for layer, x, y in zip(layers, inputs, plain, strict=True))
