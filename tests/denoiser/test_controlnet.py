from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor

from ldm.config import from_dict
from ldm.denoiser import ControlNet, ControlNetConfig, UNet, UNetConfig
from ldm.errors import ConfigError
from ldm.nn.conditioning import Conditioning
from ldm.nn.embeddings import sinusoidal
from tests.denoiser.peers import from_diffusers, randomize

BATCH, TOKENS, CONTEXT = 2, 5, 24
NOISE_LEVELS = torch.tensor([0.0, 421.5])
HINT_WIDTHS = [4, 6]
VECTOR = 20 + 6 * 8

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": (
        {"down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"], "attention_head_dim": 4},
        {"levels": [1, 1, 0], "heads": 4, "projection": "conv"},
    ),
    "sd2": (
        {
            "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
            "attention_head_dim": [2, 4, 8],
            "use_linear_projection": True,
        },
        {"levels": [1, 1, 0], "head_width": 8},
    ),
    "sdxl": (
        {
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "attention_head_dim": [2, 4, 8],
            "transformer_layers_per_block": [1, 2, 3],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": VECTOR,
        },
        {"levels": [0, 2, 3], "middle_depth": 3, "head_width": 8, "vector_width": VECTOR},
    ),
}
"""Settings of diffusers and of ours, whose levels are given by their depths."""

WIDTHS = [16, 32, 64]


def pair(kind: str, global_pool: bool = False) -> tuple[ControlNet, ControlNetModel]:
    """Our network with the weights of a random one of diffusers."""
    theirs, own = KINDS[kind]
    peer = ControlNetModel(
        block_out_channels=WIDTHS,
        layers_per_block=2,
        cross_attention_dim=CONTEXT,
        norm_num_groups=8,
        conditioning_embedding_out_channels=HINT_WIDTHS,
        global_pool_conditions=global_pool,
        **theirs,
    )
    levels = [{"width": width, "depth": depth} for width, depth in zip(WIDTHS, own["levels"], strict=True)]
    encoder = {"groups": 8, "context_width": CONTEXT, **own, "levels": levels}
    config = {"encoder": encoder, "hint_widths": HINT_WIDTHS, "global_pool": global_pool}
    network = from_dict(ControlNetConfig, config).build()
    network.load_state_dict(named(randomize(peer)))
    return network.eval(), peer


def named(peer: torch.nn.Module) -> dict[str, Tensor]:
    last, state = 2 * len(HINT_WIDTHS) - 1, {}
    for name, tensor in from_diffusers(peer, 2).items():
        if found := re.match(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks)(?:\.(\d+))?\.(\w+)", name):
            index = {"conv_in": 0, "conv_out": last}.get(found[1], 1 + int(found[2] or 0))
            name = f"hint.convs.{index}.{found[3]}"
        name = re.sub(r"^controlnet_down_blocks\.", "zeros.", name)
        name = re.sub(r"^controlnet_mid_block\.", "zeros.9.", name)
        state[name] = tensor
    return state


def inputs(kind: str, height: int, width: int) -> tuple[Tensor, Conditioning, Tensor, dict[str, Any]]:
    x, context = torch.randn(BATCH, 4, height, width), torch.randn(BATCH, TOKENS, CONTEXT)
    hint = torch.rand(BATCH, 3, 2 * height, 2 * width)
    if kind != "sdxl":
        return x, Conditioning(context=context), hint, {}
    pooled, sizes = torch.randn(BATCH, 20), torch.randint(0, 1024, (BATCH, 6)).float()
    vector = torch.cat([pooled, sinusoidal(sizes.flatten(), 8).reshape(BATCH, -1)], dim=1)
    more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    return x, Conditioning(context=context, vector=vector), hint, more


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_residuals_are_those_of_diffusers(kind: str) -> None:
    network, peer = pair(kind)
    x, cond, hint, more = inputs(kind, 6, 10)  # becomes 3 x 5, then 2 x 3
    down, middle = peer(x, NOISE_LEVELS, cond.context, hint, return_dict=False, **more)
    residuals = network(x, NOISE_LEVELS, cond, network.hint(hint))
    assert len(residuals) == len(down) + 1
    for own, expected in zip(residuals, [*down, middle], strict=True):
        assert expected.std() > 0.1
        assert (own - expected).abs().max() < 1e-4


@torch.no_grad()
def test_pooled_residuals_are_those_of_diffusers() -> None:
    network, peer = pair("sd1", global_pool=True)
    x, cond, hint, _ = inputs("sd1", 4, 6)
    down, middle = peer(x, NOISE_LEVELS, cond.context, hint, return_dict=False)
    for own, expected in zip(network(x, NOISE_LEVELS, cond, network.hint(hint)), [*down, middle], strict=True):
        assert own.shape == expected.shape == (BATCH, own.shape[1], 1, 1)
        assert (own - expected).abs().max() < 1e-4


@pytest.mark.parametrize("global_pool", [False, True])
def test_an_untrained_one_changes_nothing_and_a_trained_one_does(global_pool: bool) -> None:
    encoder = {"levels": [{"width": 8, "depth": 1}, {"width": 16}], "heads": 2, "groups": 4, "context_width": CONTEXT}
    unet = randomize(from_dict(UNetConfig, encoder).build())
    assert isinstance(unet, UNet)
    config = {"encoder": encoder, "hint_widths": HINT_WIDTHS, "global_pool": global_pool}
    network = from_dict(ControlNetConfig, config).build().eval()
    x, cond, hint, _ = inputs("sd1", 4, 6)
    with torch.no_grad():
        plain = unet(x, NOISE_LEVELS, cond)
        untrained = network(x, NOISE_LEVELS, cond, network.hint(hint))
        assert torch.equal(unet(x, NOISE_LEVELS, cond, residuals=untrained), plain)
        randomize(network)
        trained = network(x, NOISE_LEVELS, cond, network.hint(hint))
        assert not torch.equal(unet(x, NOISE_LEVELS, cond, residuals=trained), plain)


def test_channels_of_an_inpainting_network_are_used_only_if_the_controlnet_has_them() -> None:
    encoder = {"levels": [{"width": 8}], "heads": 2, "groups": 4, "middle_depth": 0}
    x, concat, hint = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 6, 6), torch.rand(2, 3, 6, 6)
    for channels in (4, 9):
        config = {"encoder": encoder | {"in_channels": channels}, "hint_widths": [4]}
        network = randomize(from_dict(ControlNetConfig, config).build())
        assert isinstance(network, ControlNet)
        with torch.no_grad():
            embedded = network.hint(hint)
            given = network(x, torch.zeros(2), Conditioning(concat=concat), embedded)
            other = network(x, torch.zeros(2), Conditioning(concat=-concat), embedded)
        assert torch.equal(given[-1], other[-1]) == (channels == 4)


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hint_widths is \[\] and hint_channels 3; give at least one width"):
        from_dict(ControlNetConfig, {"encoder": {"levels": [{"width": 8}], "heads": 1, "groups": 4}, "hint_widths": []})
