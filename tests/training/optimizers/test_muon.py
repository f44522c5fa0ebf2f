from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.clip.image import ViTConfig
from ldm.config import from_dict
from ldm.denoiser.mlp import MLPConfig
from ldm.errors import ConfigError
from ldm.training.config import TrainConfig
from ldm.training.optimizers.muon import LAYERS, Muon, MuonConfig, hidden_matrices, orthogonalized
from ldm.vae.discriminator import PatchDiscriminator
from ldm.vae.tiny_decoder import TinyDecoderConfig
from tests.tiny import tiny_model

RATE, DECAY = 0.02, 0.1
QUANT = ["quant_conv", "post_quant_conv"]


def muon(network: nn.Module, **options: Any) -> Muon:
    train = TrainConfig(100, 1, RATE, weight_decay=DECAY)
    return from_dict(MuonConfig, options).build([network], train)


def polynomial(matrix: Tensor, iterations: int = 5) -> Tensor:
    """p(...p(sigma / |M|)) for each singular value, p(x) = a x + b x^3 + c x^5, in fp64."""
    u, sigma, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    sigma = sigma / sigma.norm()
    for _ in range(iterations):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return u @ sigma.diag() @ v


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8), (1, 5)])
def test_the_iteration_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrices, 5)
    torch.testing.assert_close(found, torch.stack([polynomial(each).float() for each in matrices]), atol=1e-4, rtol=0)
    assert torch.linalg.svdvals(found).min() > 0.4
    assert torch.linalg.svdvals(found).max() < 1.25
    in_bf16 = orthogonalized(matrices.bfloat16(), 5)
    assert in_bf16.dtype == torch.bfloat16
    assert (in_bf16.float() - found).norm() < 0.03 * found.norm()


@pytest.mark.parametrize("iterations", [1, 5, 11])
@pytest.mark.parametrize("spectrum", ["flat", "decaying", "half zero", "one"])
def test_the_iteration_is_stable_in_bf16(spectrum: str, iterations: int) -> None:
    """Also for wide matrices, several iterations of which share one Gram matrix."""
    m, n, generator = 64, 576, torch.Generator().manual_seed(0)
    sigma = {
        "flat": torch.ones(m),
        "decaying": torch.logspace(0, -6, m),
        "half zero": torch.arange(m).lt(m // 2).float(),
        "one": torch.arange(m).eq(0).float(),
    }[spectrum]
    u, _, v = torch.linalg.svd(torch.randn(m, n, generator=generator), full_matrices=False)
    matrix = u @ sigma.diag() @ v
    found = orthogonalized(matrix[None].bfloat16(), iterations)[0].float()
    assert torch.linalg.svdvals(found).max() < 1.25
    large = sigma > 0.05
    components = (u.mT @ found @ v.mT).diagonal()[large]
    expected = (u.mT @ polynomial(matrix, iterations).float() @ v.mT).diagonal()[large]
    if iterations <= 5:  # more of them move singular values near 1 by turns up and down
        torch.testing.assert_close(components, expected, atol=0.1, rtol=0)
    assert components.min() > 0.4 or iterations == 1


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("scale", "rows", "factor"),
    [
        ("adamw", 4, 0.2 * 18**0.5),
        ("adamw", 40, 0.2 * 40**0.5),
        ("spectral", 4, 1.0),
        ("spectral", 40, (40 / 18) ** 0.5),
    ],
)
def test_the_update_is_that_of_the_description(
    nesterov: bool, scale: str, rows: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B <- mu B + G; the update is the orthogonal matrix of G + mu B (Nesterov) or B, of a flattened convolution."""
    monkeypatch.setattr("ldm.training.optimizers.muon.default_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    layer = nn.Conv2d(2, rows, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = muon(layer, nesterov=nesterov, scale=scale, momentum=0.9, learning_rate_factor=0.5)
    optimizer.param_groups[0]["lr"] = rate = RATE / 2
    weight, momentum = layer.weight.detach().flatten(1).double(), torch.zeros(rows, 18, dtype=torch.float64)
    for _ in range(3):
        layer.weight.grad = torch.randn(rows, 2, 3, 3)
        gradient = layer.weight.grad.flatten(1).double()
        momentum = 0.9 * momentum + gradient
        update = polynomial(gradient + 0.9 * momentum if nesterov else momentum)
        weight = (1 - rate * DECAY) * weight - rate * factor * update
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach().flatten(1).double(), weight, atol=1e-5, rtol=1e-5)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize(("scale", "theirs"), [("adamw", "match_rms_adamw"), ("spectral", "original")])
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_it_is_torchs_muon_on_matrices(scale: str, theirs: str, shape: tuple[int, int]) -> None:
    """To the rounding of bf16, in which torch iterates on CPUs too."""
    ends = []
    for ours in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(*shape, bias=False)
        begin = layer.weight.detach().clone()
        optimizer: torch.optim.Optimizer = muon(layer, scale=scale)
        if not ours:
            optimizer = torch.optim.Muon([layer.weight], lr=RATE, weight_decay=DECAY, adjust_lr_fn=theirs)
        for _ in range(4):
            layer(torch.randn(8, shape[0])).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(layer.weight.detach() - begin)
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[1].norm()


def test_hidden_matrices_and_convolutions_are_those_of_muon() -> None:
    model = tiny_model()
    optimizer = MuonConfig().build([model], TrainConfig(1, 1, 1e-3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{names[each] for each in group["params"]} for group in optimizer.param_groups]
    assert sum(map(len, groups)) == len({name for name, each in model.named_parameters() if each.requires_grad})
    matrices, others, vectors = groups
    assert all(name.endswith(".weight") for name in matrices)
    assert not any(part in name for name in matrices for part in ("conv_in", "conv_out", "token_embedding"))
    assert any(".to_q." in name for name in matrices)
    assert any(".to_out." in name for name in matrices)
    assert any("conv1" in name or ".conv." in name for name in matrices)
    assert {name for name in others if name.endswith(("conv_in.weight", "conv_out.weight"))}
    assert all(dict(model.named_parameters())[name].ndim < 2 for name in vectors)
    assert [group.get("muon", False) for group in optimizer.param_groups] == [True, False, False]


@pytest.mark.parametrize(
    ("network", "ends"),
    [
        (PatchDiscriminator(3, 8, 2), ["body.0", "body.8"]),
        (TinyDecoderConfig(widths=(8, 8), blocks=1).build(), ["layers.0", "layers.5"]),
        (MLPConfig().build(), ["layers.0", "out"]),
        (
            tiny_model().first_stage,
            [f"{coder}.conv_{end}" for coder in ("encoder", "decoder") for end in ("in", "out")] + QUANT,
        ),
        (tiny_model().denoiser, ["conv_in", "conv_out"]),
        (
            ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2).build(8),
            ["patch_embedding", "projection"],
        ),
    ],
)
def test_the_first_and_last_layers_of_each_network_are_left_to_adamw(network: nn.Module, ends: list[str]) -> None:
    hidden = {*hidden_matrices([network], [])}
    found = {
        name for name, layer in network.named_modules() if isinstance(layer, LAYERS) and layer.weight not in hidden
    }
    assert found == {*ends}


def test_frozen_weights_and_grouped_convolutions_are_left_out() -> None:
    network = nn.Sequential(
        nn.Linear(4, 4).requires_grad_(False), nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(4, 4), nn.Linear(4, 4)
    )
    assert list(hidden_matrices([network], [])) == [network[3].weight]
    assert list(hidden_matrices([network], ["3"])) == []


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"iterations": 0}, {"learning_rate_factor": 0.0}])
def test_impossible_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"momentum .* must be in \[0, 1\), iterations"):
        from_dict(MuonConfig, options)
