"""Reuse of deep features and token merging: exact when they are off, cheaper when they are on, and per image when they act."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion import SAMPLERS, Guidance
from ldm.errors import SamplingError
from ldm.model import LatentDiffusion
from ldm.nn.attention import AttentionOptions
from ldm.nn.conditioning import Conditioning
from ldm.nn.deep_features import DeepFeatures
from ldm.nn.token_merging import TokenMerging
from ldm.pipeline import Pipeline
from tests.tiny import tiny_model

LEVELS = [{"width": 16, "blocks": 2, "depth": 1}, {"width": 16, "blocks": 1, "depth": 1}]
UNET = {"kind": "unet", "levels": LEVELS, "heads": 2, "groups": 4, "context_width": 16}
QUICK = ("heun", "dpmpp_2m", "dpmpp_2m_sde")
"""Solvers that are tried in the quick suite: with two evaluations a step, multistep, stochastic."""

SHORTCUTS: list[dict[str, Any]] = [
    {"cache_interval": 3},
    {"token_merging": 0.5},
    {"cache_interval": 2, "token_merging": 0.3},
]


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model(denoiser=UNET)


def sampled(model: LatentDiffusion, **settings: Any) -> Tensor:
    settings = {"prompt": "a red apple", "seed": 1, "num_inference_steps": 6, "output_type": "latent"} | settings
    return Pipeline(model)(**settings, progress=False)


def inputs(model: LatentDiffusion, rows: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, 8, 8, generator=generator)
    return x, torch.full((rows,), 500.0), Conditioning(context=torch.randn(rows, 12, 16, generator=generator))


# Both


def test_at_their_neutral_values_images_are_bitwise_the_same(model: LatentDiffusion) -> None:
    expected = sampled(model)
    assert torch.equal(sampled(model, cache_interval=1, token_merging=0), expected)
    with torch.no_grad():
        x, level, cond = inputs(model)
        plain = model.denoiser(x, level, cond)
        assert torch.equal(model.denoiser(x, level, cond, AttentionOptions(deep_features=DeepFeatures(3))), plain)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_images_change_a_little_and_do_not_depend_on_their_batch(
    model: LatentDiffusion, shortcut: dict[str, Any]
) -> None:
    exact, alone = sampled(model), sampled(model, **shortcut)
    assert not torch.equal(alone, exact)
    assert (alone - exact).abs().mean() < 0.5 * exact.abs().mean()
    together = sampled(model, prompt=["a red apple", "a blue car", "a blue sky"], seed=[1, 2, 3], **shortcut)
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    in_parts = sampled(model, prompt=["a blue car", "a red apple"], seed=[2, 1], batch_size=1, **shortcut)
    torch.testing.assert_close(in_parts[1:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "sampler", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in SAMPLERS]
)
def test_every_solver_runs_with_both(model: LatentDiffusion, sampler: str) -> None:
    levels: dict[str, Any] = {"num_inference_steps": 3}
    assert sampled(model, sampler=sampler, cache_interval=2, token_merging=0.5, **levels).isfinite().all()


@pytest.mark.parametrize(
    "guidance",
    [Guidance(3.0, perturbed=2.0), Guidance(3.0, interval=(0.5, 5.0)), Guidance(1.0)],
    ids=["perturbed", "interval", "none"],
)
def test_every_guidance_runs_with_both(model: LatentDiffusion, guidance: Guidance) -> None:
    images = sampled(model, guidance=guidance, cache_interval=2, token_merging=0.5)
    assert images.isfinite().all()
    assert (images - sampled(model, guidance=guidance)).abs().mean() < 1


def test_the_settings_are_recorded(model: LatentDiffusion) -> None:
    image = sampled(model, cache_interval=2, token_merging=0.25, output_type="pil")[0]  # type: ignore[index]
    settings = json.loads(image.info["settings"])
    assert (settings["cache_interval"], settings["token_merging"]) == (2, 0.25)
    assert "cache_interval" not in json.loads(sampled(model, output_type="pil")[0].info["settings"])  # type: ignore[union-attr]


def test_a_denoiser_without_the_structure_is_refused_in_a_sentence() -> None:
    without_attention = tiny_model(
        "none", denoiser=UNET | {"levels": [{"width": 16, "blocks": 1}], "context_width": None}
    )
    with pytest.raises(
        SamplingError, match=r"^the denoiser unet of this model has no self-attention outside of its middle; leave"
    ):
        Pipeline(without_attention)(token_merging=0.5)
    points = {"kind": "mlp", "width": 8, "layers": 1, "num_timesteps": 1000}
    toy = tiny_model("none", denoiser=points, first_stage={"kind": "identity", "image_channels": 2}, size=[1, 1])
    with pytest.raises(
        SamplingError, match=r"^the denoiser mlp of this model stores no deep features; leave cache_interval"
    ):
        Pipeline(toy)(cache_interval=2, output_type="latent")
    with pytest.raises(SamplingError, match=r"token_merging.*0\.75"):
        Pipeline(without_attention)(token_merging=0.9)
    with pytest.raises(SamplingError, match="cache_interval"):
        Pipeline(without_attention)(cache_interval=0)


def test_compiled_networks_refuse_them() -> None:
    model = tiny_model(denoiser=UNET)
    model.accelerator = object()  # type: ignore[assignment]
    with pytest.raises(
        SamplingError, match=r"^compiled networks take no cache_interval; leave it out, or call pipe.decompile"
    ):
        Pipeline(model).stream("a red apple", cache_interval=2)


# Deep features


def test_the_inner_blocks_are_evaluated_once_in_an_interval(model: LatentDiffusion) -> None:
    calls: Counter[str] = Counter()
    watched = [
        (f"{part}.{i}", block)
        for part in ("down", "middle", "up")
        for i, block in enumerate(getattr(model.denoiser, part))
    ]
    hooks = [block.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, block in watched]
    try:
        sampled(model, sampler="euler", num_inference_steps=6, cache_interval=3)
    finally:
        for hook in hooks:
            hook.remove()
    last = len(model.denoiser.up) - 1  # type: ignore[arg-type]
    outer = {"down.0", f"up.{last - 1}", f"up.{last}"}
    assert {name: calls[name] for name, _ in watched} == {name: 6 if name in outer else 2 for name, _ in watched}


def test_features_of_the_same_input_give_the_same_output(model: LatentDiffusion) -> None:
    x, level, cond = inputs(model)
    residuals = [torch.randn(2, 16, *size) for size in [(8, 8)] * 3 + [(4, 4)] * 3]
    with torch.no_grad():
        for more in ((), residuals):
            options = AttentionOptions(deep_features=DeepFeatures(2))
            first = model.denoiser(x, level, cond, options, more)
            torch.testing.assert_close(model.denoiser(x, level, cond, options, more), first)


def test_features_are_computed_again_for_another_number_of_rows() -> None:
    features = DeepFeatures(3)
    assert features.reusable(2) is None
    features.store(torch.zeros(2, 1, 1, 1))
    assert features.reusable(4) is None
    assert [features.reusable(2) is not None for _ in range(3)] == [True, True, False]


# Token merging


def test_equal_positions_are_merged_and_unmerged_without_a_change() -> None:
    quarter = torch.randn(2, 2, 3, 5).repeat_interleave(2, 1).repeat_interleave(2, 2)  # squares of equal positions
    x = quarter.flatten(1, 2)
    for ratio in (0.25, 0.75):
        merging = TokenMerging(x, (4, 6), ratio)
        merged = merging.merge(x)
        assert merged.shape[1] == 24 - round(24 * ratio)
        torch.testing.assert_close(merging.unmerge(merged), x)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
def test_nothing_is_lost_at_any_size(size: tuple[int, int]) -> None:
    x = torch.randn(2, size[0] * size[1], 8)
    unmerged = (merging := TokenMerging(x, size, 0.5)).unmerge(merging.merge(x))
    assert unmerged.shape == x.shape
    merging = TokenMerging(x, size, 0.0)
    assert torch.equal(merging.unmerge(merging.merge(x)), x)


def test_a_destination_is_the_mean_of_what_is_merged_into_it() -> None:
    x = torch.eye(4)[None] + 0.1
    x[0, 1] = x[0, 0] * 3  # the most similar to the destination, position 0
    merged = TokenMerging(x, (2, 2), 0.25).merge(x)
    assert merged.shape == (1, 3, 4)
    torch.testing.assert_close(merged[0, -1], (x[0, 0] + x[0, 1]) / 2)


def test_only_the_largest_self_attentions_see_fewer_positions(model: LatentDiffusion) -> None:
    seen: Counter[int] = Counter()
    blocks = [each for each in model.denoiser.modules() if hasattr(each, "attn1")]
    hooks = [each.attn1.register_forward_pre_hook(lambda _, args: seen.update([args[0].shape[1]])) for each in blocks]
    try:
        with torch.no_grad():
            model.denoiser(*inputs(model), AttentionOptions(token_merging=0.5))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {32: 5, 16: 4}  # of 64 positions, and of 16 in the level below and the middle
