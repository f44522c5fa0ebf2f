from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from ldm.config import from_dict
from ldm.denoiser import UNet, UNetConfig
from ldm.errors import ConfigError
from ldm.nn.conditioning import Conditioning
from ldm.nn.embeddings import sinusoidal
from tests.denoiser.peers import from_diffusers, randomize

BATCH, TOKENS, CONTEXT = 3, 13, 24
SIZES = [(40, 24), (12, 20)]  # 12 x 20 becomes 3 x 5, then 2 x 3
NOISE_LEVELS = torch.tensor([0.0, 421.5, 999.0])


def peer_unet(widths: list[int], blocks: int, attends: list[bool], **options: Any) -> UNet2DConditionModel:
    cross = {True: "CrossAttn", False: ""}
    return randomize(
        UNet2DConditionModel(
            block_out_channels=widths,
            layers_per_block=blocks,
            down_block_types=[f"{cross[level]}DownBlock2D" for level in attends],
            up_block_types=[f"{cross[level]}UpBlock2D" for level in reversed(attends)],
            cross_attention_dim=CONTEXT,
            norm_num_groups=8,
            **options,
        )
    )


def ours(peer: torch.nn.Module, blocks: int, **config: Any) -> UNet:
    unet = from_dict(UNetConfig, {"groups": 8, "context_width": CONTEXT, **config}).build()
    unet.load_state_dict(from_diffusers(peer, blocks))
    return unet.eval()


@torch.no_grad()
def assert_equal(
    unet: UNet, peer: torch.nn.Module, height: int, width: int, vector: Tensor | None = None, **peers: Any
) -> None:
    x, context = torch.randn(BATCH, 4, height, width), torch.randn(BATCH, TOKENS, CONTEXT)
    expected = peer(x, NOISE_LEVELS, context, **peers).sample
    assert expected.std() > 0.1
    assert (unet(x, NOISE_LEVELS, Conditioning(context=context, vector=vector)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_equals_diffusers_in_the_shape_of_sd_1(size: tuple[int, int]) -> None:
    """Four levels, the last without attention; convolutions as projections; a number of heads."""
    widths = [16, 32, 64, 64]
    peer = peer_unet(widths, 2, [True, True, True, False], attention_head_dim=4)  # here, the number of heads
    levels = [{"width": width, "blocks": 2, "depth": depth} for width, depth in zip(widths, [1, 1, 1, 0], strict=True)]
    assert_equal(ours(peer, 2, levels=levels, heads=4, projection="conv"), peer, *size)


@pytest.mark.parametrize("size", SIZES)
def test_equals_diffusers_in_the_shape_of_sd_2(size: tuple[int, int]) -> None:
    """Linear projections; a width of the heads."""
    widths = [16, 32, 64, 64]
    peer = peer_unet(widths, 2, [True, True, True, False], attention_head_dim=[2, 4, 8, 8], use_linear_projection=True)
    levels = [{"width": width, "blocks": 2, "depth": depth} for width, depth in zip(widths, [1, 1, 1, 0], strict=True)]
    assert_equal(ours(peer, 2, levels=levels, head_width=8), peer, *size)


@pytest.mark.parametrize("size", SIZES)
def test_equals_diffusers_in_the_shape_of_sdxl(size: tuple[int, int]) -> None:
    """Three levels of other depths, the first without attention; pooled text and six embedded sizes as the vector."""
    widths = [16, 32, 64]
    peer = peer_unet(
        widths,
        2,
        [False, True, True],
        attention_head_dim=[2, 4, 8],
        transformer_layers_per_block=[1, 2, 3],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    levels = [{"width": width, "blocks": 2, "depth": depth} for width, depth in zip(widths, [0, 2, 3], strict=True)]
    unet = ours(peer, 2, levels=levels, middle_depth=3, head_width=8, vector_width=20 + 6 * 8)
    pooled, sizes = torch.randn(BATCH, 20), torch.randint(0, 1024, (BATCH, 6)).float()
    vector = torch.cat([pooled, sinusoidal(sizes.flatten(), 8).reshape(BATCH, -1)], dim=1)
    assert_equal(unet, peer, *size, vector, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})


def test_equals_diffusers_with_a_projected_vector_and_one_block_a_level() -> None:
    peer = peer_unet(
        [16, 32],
        1,
        [True, True],
        attention_head_dim=2,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=10,
    )
    levels = [{"width": 16, "blocks": 1, "depth": 1}, {"width": 32, "blocks": 1, "depth": 1}]
    vector = torch.randn(BATCH, 10)
    unet = ours(peer, 1, levels=levels, heads=2, projection="conv", vector_width=10)
    assert_equal(unet, peer, 7, 9, vector, class_labels=vector)


def test_the_mask_hides_tokens_of_the_context() -> None:
    peer = peer_unet([16, 32], 1, [True, True], attention_head_dim=2)
    levels = [{"width": 16, "blocks": 1, "depth": 1}, {"width": 32, "blocks": 1, "depth": 1}]
    unet = ours(peer, 1, levels=levels, heads=2, projection="conv")
    x, context = torch.randn(BATCH, 4, 8, 8), torch.randn(BATCH, TOKENS, CONTEXT)
    mask = torch.arange(TOKENS) < torch.tensor([[1], [6], [TOKENS]])
    with torch.no_grad():
        masked = unet(x, NOISE_LEVELS, Conditioning(context=context, mask=mask))
        expected = peer(x, NOISE_LEVELS, context, encoder_attention_mask=mask).sample
        cut = unet(x[1:2], NOISE_LEVELS[1:2], Conditioning(context=context[1:2, :6]))
        changed = torch.where(mask[..., None], context, 100.0)
        elsewhere = unet(x, NOISE_LEVELS, Conditioning(context=changed, mask=mask))
    assert (masked - expected).abs().max() < 1e-4
    assert (masked[1:2] - cut).abs().max() < 1e-5
    assert torch.equal(masked, elsewhere)


def test_concat_is_read_as_further_channels() -> None:
    unet = from_dict(
        UNetConfig, {"levels": [{"width": 8, "blocks": 1}], "in_channels": 6, "heads": 1, "groups": 4}
    ).build()
    unet = randomize(unet)
    x, concat = torch.randn(2, 4, 6, 6), torch.randn(2, 2, 6, 6)
    with torch.no_grad():
        joined = unet(torch.cat([x, concat], dim=1), torch.zeros(2), Conditioning())
        assert torch.equal(unet(x, torch.zeros(2), Conditioning(concat=concat)), joined)


def test_without_context_there_is_no_cross_attention() -> None:
    """A config without context_width listens to its own positions alone, whatever the record holds."""
    levels = [{"width": 8, "blocks": 1, "depth": 1}, {"width": 16, "blocks": 1, "depth": 2}]
    unet = randomize(from_dict(UNetConfig, {"levels": levels, "heads": 2, "groups": 4}).build())
    assert not [name for name, _ in unet.named_parameters() if "attn2" in name]
    x = torch.randn(2, 4, 7, 5)
    with torch.no_grad():
        alone = unet(x, torch.zeros(2), Conditioning())
        assert torch.equal(alone, unet(x, torch.zeros(2), Conditioning(context=torch.randn(2, 5, 3))))
    assert alone.shape == x.shape


def test_without_attention_it_is_the_unet_of_ddpm() -> None:
    peer = randomize(
        UNet2DModel(
            in_channels=4, out_channels=4, block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8,
            down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, add_attention=False,
            freq_shift=0, flip_sin_to_cos=True, norm_eps=1e-5, downsample_padding=1,
        )
    )  # fmt: skip
    levels = [{"width": 16, "blocks": 1}, {"width": 32, "blocks": 1}]
    unet = ours(peer, 1, levels=levels, heads=1, middle_depth=0, context_width=None)
    x = torch.randn(BATCH, 4, 10, 14)
    with torch.no_grad():
        expected = peer(x, NOISE_LEVELS).sample
        assert (unet(x, NOISE_LEVELS, Conditioning()) - expected).abs().max() < 1e-4


def test_an_untrained_network_answers_zero() -> None:
    """Residual branches begin as nothing, so the first steps of a training are the same at any depth."""
    levels = [{"width": 8, "blocks": 2, "depth": 1}, {"width": 16, "blocks": 1}]
    unet = from_dict(UNetConfig, {"levels": levels, "heads": 2, "groups": 4}).build()
    assert unet(torch.randn(2, 4, 6, 6), torch.zeros(2), Conditioning()).abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": []}, "needs at least one level"),
        ({"heads": None}, "give either heads or head_width"),
        ({"head_width": 8}, "give either heads or head_width"),
        ({"heads": 3}, r"levels\[0\]\.width 16 is not divisible by heads 3"),
        ({"heads": None, "head_width": 12}, r"levels\[0\]\.width 16 is not divisible by head_width 12"),
        ({"groups": 5}, r"levels\[0\]\.width 16 is not divisible by 5 groups"),
        ({"projection": "covn"}, r"projection: unknown value 'covn'; did you mean 'conv'\?"),
    ],
)
def test_impossible_networks_are_refused(changes: dict[str, Any], message: str) -> None:
    config = {"levels": [{"width": 16, "depth": 1}], "heads": 4, "groups": 8}
    with pytest.raises(ConfigError, match=message):
        from_dict(UNetConfig, config | changes)


def test_heads_need_not_divide_a_level_without_attention() -> None:
    levels = [{"width": 8, "blocks": 1}, {"width": 24, "blocks": 1, "depth": 1}]
    unet = from_dict(UNetConfig, {"levels": levels, "heads": 3, "groups": 4}).build()
    assert unet(torch.randn(1, 4, 4, 4), torch.zeros(1), Conditioning()).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("heads", [{"heads": 4}, {"head_width": 24}])
def test_other_widths_are_divisible_by_groups_and_heads(heads: dict[str, int]) -> None:
    levels = [{"width": 96, "blocks": 1}, {"width": 192, "blocks": 1, "depth": 1}]
    config = from_dict(UNetConfig, {"groups": 16, "context_width": CONTEXT, "levels": levels, **heads})
    assert config.with_width(1.0) == config
    widths = [[level.width for level in config.with_width(factor).levels] for factor in (0.01, 0.5, 0.75, 2)]
    multiple = 16 if "heads" in heads else 48
    assert widths == [[multiple] * 2, [48, 96], [64, 144] if multiple == 16 else [96, 144], [192, 384]]
    x = torch.randn(1, 4, 8, 8)
    narrow = config.with_width(0.5).build()
    assert narrow(x, torch.zeros(1), Conditioning(context=torch.randn(1, 3, CONTEXT))).shape == x.shape
