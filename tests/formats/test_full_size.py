"""The published models in their real sizes, without weights: every key and shape, and diffusers' own count of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from ldm.clip.text import TextTowerConfig
from ldm.clip.text_formats import OpenAITextSingleFile, OpenCLIPTextSingleFile, TextFolder
from ldm.denoiser import LevelSpec, UNetConfig
from ldm.denoiser.unet_formats import UNetFolder, UNetSingleFile
from ldm.formats.checkpoint import Part
from ldm.formats.native import WithoutInit
from ldm.formats.network_folder import canonical
from ldm.nn.network_format import export_weights, import_weights
from ldm.vae import AutoencoderKLConfig
from ldm.vae.autoencoder_formats import AutoencoderFolder, AutoencoderSingleFile


def levels(widths: tuple[int, ...], depths: tuple[int, ...]) -> tuple[LevelSpec, ...]:
    return tuple(LevelSpec(width, 2, depth) for width, depth in zip(widths, depths, strict=True))


WIDTHS = (320, 640, 1280, 1280)
UNETS = {
    "SD 1": UNetConfig(levels(WIDTHS, (1, 1, 1, 0)), context_width=768, heads=8, projection="conv"),
    "SD 2": UNetConfig(levels(WIDTHS, (1, 1, 1, 0)), context_width=1024, head_width=64),
    "SDXL": UNetConfig(
        levels(WIDTHS[:3], (0, 2, 10)), context_width=2048, head_width=64, middle_depth=10, vector_width=2816
    ),
}
SIZES = {"SD 1": (686, 859_520_964), "SD 2": (686, 865_910_724), "SDXL": (1680, 2_567_463_684)}
XL_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
PEERS: dict[str, dict[str, Any]] = {
    "SD 1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "SDXL": {
        "block_out_channels": WIDTHS[:3],
        "down_block_types": XL_BLOCKS,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(XL_BLOCKS)),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXTS = {
    "OpenAI L": TextTowerConfig(activation="quick_gelu"),
    "OpenCLIP H": TextTowerConfig(width=1024, layers=24, heads=16),
    "OpenCLIP bigG": TextTowerConfig(width=1280, layers=32, heads=20, embed_dim=1280),
}


def empty(build: Any) -> nn.Module:
    with torch.device("meta"), WithoutInit():
        network: nn.Module = build()
    return network


def weights(config: Any) -> dict[str, Tensor]:
    return Part(config, empty(config.build).state_dict()).weights


def counted(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    return len(tensors), sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_is_known_by_names_and_shapes_of_an_ldm_file(kind: str) -> None:
    state = weights(UNETS[kind])
    theirs = export_weights(state, UNetSingleFile().key_table(UNETS[kind], state, {}))
    assert counted(theirs) == SIZES[kind]
    assert UNetSingleFile().infer_config(theirs, "a file") == UNETS[kind]


@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_has_every_key_and_shape_of_diffusers(kind: str) -> None:
    peer = empty(lambda: diffusers.UNet2DConditionModel(**PEERS[kind]))
    form, extra = UNetFolder(), {"addition_embed_type": "text_time"}
    config = form.read_config(peer.config, (), "config.json")
    assert config == UNETS[kind]
    state = weights(config)
    table = form.key_table(config, state, extra)
    found = import_weights(peer.state_dict(), table, state, "a folder")  # raises if a name or shape does not fit
    assert counted(found) == SIZES[kind]
    assert form.read_config(form.write_config(config, (64, 64), extra), (), "config.json") == config


def test_the_autoencoder_of_all_three() -> None:
    config = AutoencoderKLConfig()
    state = weights(config)
    theirs = export_weights(state, AutoencoderSingleFile().key_table(config, state, {}))
    assert counted(theirs) == (248, 83_653_863)
    assert AutoencoderSingleFile().infer_config(theirs, "a file") == config
    assert all(tensor.ndim == 4 for name, tensor in theirs.items() if "attn_1.q.weight" in name)

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    peer = empty(
        lambda: diffusers.AutoencoderKL(block_out_channels=config.widths, layers_per_block=2, **blocks)  # type: ignore[arg-type]
    )
    form = AutoencoderFolder()
    read = form.read_config(peer.config, (), "config.json")
    assert read == replace(config, overflows_fp16=True)  # diffusers' default of force_upcast
    table = form.key_table(config, state, {})
    assert counted(import_weights(peer.state_dict(), table, state, "a folder"))[0] == 248


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_towers(name: str) -> None:
    config = TEXTS[name]
    state = weights(config)
    file = OpenAITextSingleFile() if name == "OpenAI L" else OpenCLIPTextSingleFile()
    theirs = export_weights(state, file.key_table(config, state, {}))
    assert file.infer_config(theirs, "a file") == config
    form = TextFolder()
    known = form.write_config(config, (512, 512), {})
    kind = transformers.CLIPTextModelWithProjection if config.embed_dim else transformers.CLIPTextModel
    peer = empty(lambda: kind(transformers.CLIPTextConfig(**known)))
    tensors, _ = canonical(peer.state_dict(), form)
    import_weights(tensors, form.key_table(config, state, {}), state, "a folder")
