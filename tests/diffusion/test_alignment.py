from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.clip.image import VisionTransformer, ViTConfig
from ldm.config import from_dict
from ldm.diffusion import DenoisingLossConfig, Diffusion, RepresentationAlignmentConfig, WeightedLossConfig
from ldm.diffusion.alignment import RepresentationAlignment, resized, similarity
from ldm.diffusion.parametrization import V
from ldm.diffusion.schedule import ScaledLinear
from ldm.errors import ConfigError

FEATURE = "middle.0"


def tower() -> VisionTransformer:
    torch.manual_seed(0)
    return ViTConfig(image_size=16, patch_size=4, width=12, layers=2, heads=2).build(8)


def zeros(x: Tensor, noise_level: Tensor, conditioning: None) -> Tensor:
    return torch.zeros_like(x)


@torch.no_grad()
def test_the_loss_is_that_of_the_paper() -> None:
    """Weighted loss - lambda / N sum_n <y_n, p_n> / (|y_n| |p_n|), with N = 16 patches, written out."""
    encoder, config = tower(), RepresentationAlignmentConfig(strength=0.7, layer=1, hidden_width=6)
    loss = config.build_aligned([5], encoder)
    x0, noise, image = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(3, 3, 16, 16) * 2 - 1
    sigma, hidden = torch.tensor([0.1, 1.0, 5.0]), torch.randn(3, 5, 4, 4)
    arguments: dict[str, Any] = {"sigma": sigma, "noise": noise}
    plain, _ = WeightedLossConfig().build()(zeros, Diffusion(ScaledLinear(), V()), x0, None, **arguments)
    found, _ = loss(
        zeros,
        Diffusion(ScaledLinear(), V()),
        x0,
        None,
        **arguments,
        features={FEATURE: hidden},
        teacher=encoder.feature_map(image, 1),
    )
    first, _, second, _, third = loss.projection
    y = encoder.block_states(image)[0][:, 1:]
    for b in range(3):
        total = 0.0
        for n in range(16):
            h = hidden[b, :, n // 4, n % 4]
            p = third(torch.nn.functional.silu(second(torch.nn.functional.silu(first(h)))))
            total += float(p @ y[b, n] / (p.norm() * y[b, n].norm()))
        assert float(found[b] - plain[b]) == pytest.approx(-0.7 * total / 16, abs=1e-5)


def test_features_that_are_equal_in_direction_have_similarity_1_and_opposite_ones_minus_1() -> None:
    y = torch.randn(4, 7, 3, 2)
    scale = torch.rand(4, 1, 3, 2) + 0.5
    torch.testing.assert_close(similarity(scale * y, y), torch.ones(4))
    torch.testing.assert_close(similarity(-scale * y, y), -torch.ones(4))


def test_the_grid_of_the_tower_is_resized_to_that_of_the_feature_map() -> None:
    """Each position of a map of half the side is a mean around its four patches, and a map of one, of all patches."""
    encoder = tower()
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    y = encoder.block_states(image)[1][:, 1:].detach().reshape(2, 4, 4, 12).permute(0, 3, 1, 2)
    assert torch.equal(resized(encoder.feature_map(image, 2), (4, 4)), y)
    # Bilinear with antialiasing, 4 -> 2: a triangle of half-width 2 around the centre 1, at 0.5, 1.5, 2.5: 3, 3, 1 of 7.
    rows = torch.tensor([[3.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 3.0]]) / 7
    torch.testing.assert_close(resized(y, (2, 2)), torch.einsum("ai,bj,ncij->ncab", rows, rows, y))
    assert resized(y, (3, 5)).shape == (2, 12, 3, 5)


def test_only_projection_and_denoiser_get_gradients_and_only_in_training() -> None:
    encoder = tower()
    loss: RepresentationAlignment = RepresentationAlignmentConfig(hidden_width=6).build_aligned([5], encoder)
    hidden, image = torch.randn(2, 5, 2, 2, requires_grad=True), torch.rand(2, 3, 16, 16)
    x0, arguments = torch.randn(2, 2, 2, 2), {"sigma": torch.ones(2), "noise": torch.randn(2, 2, 2, 2)}
    diffusion = Diffusion(ScaledLinear(), V())
    inputs: dict[str, Any] = {**arguments, "features": {FEATURE: hidden}, "teacher": encoder.feature_map(image, 2)}
    value, _ = loss(zeros, diffusion, x0, None, **inputs)
    value.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.projection.parameters())
    assert all(p.grad is None for p in encoder.parameters())
    assert loss.train().encoder.training is False
    expected, _ = WeightedLossConfig().build()(zeros, diffusion, x0, None, **arguments)
    assert torch.equal(loss.eval()(zeros, diffusion, x0, None, **inputs)[0], expected)


def test_a_layer_that_the_tower_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer of repa is 3, but the teacher has 2 blocks"):
        RepresentationAlignmentConfig(layer=3).build_aligned([5], tower())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"strength": -1}, "strength is -1"), ({"layer": 0}, "layer 0"), ({"hidden_width": 0}, "hidden_width is 0")],
)
def test_impossible_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(DenoisingLossConfig, {"kind": "repa"} | values)
