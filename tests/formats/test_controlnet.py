"""ControlNets in diffusers folders and in single files: read, written, and refused if they are broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import load
from ldm.denoiser import ControlNetConfig, LevelSpec, UNetConfig
from ldm.denoiser.controlnet_formats import ControlNetFolder, ControlNetSingleFile
from ldm.errors import CheckpointError
from ldm.formats import read, save
from ldm.formats.checkpoint import Checkpoint
from ldm.formats.single_network import save_single_network
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (64, 128), "attention_head_dim": 8, "cross_attention_dim": 32},
    "sd2": {
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 96,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 24,
    },
}
PREFIX = "control_model."


def peer(kind: str) -> ControlNetModel:
    attends, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ControlNetModel(
            layers_per_block=1,
            down_block_types=(plain, attends, attends) if kind == "sdxl" else (attends, plain),
            conditioning_embedding_out_channels=(4, 6, 8),
            global_pool_conditions=kind == "sd2",
            **KINDS[kind],
        )
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("controlnets")
    for kind in KINDS:
        peer(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def file(folders: dict[str, Path]) -> Path:
    """A single file with the names of the original repository."""
    return save_single_network(read(folders["sd1"]), folders["sd1"] / "one.safetensors", "ldm")


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert [*found.parts] == ["controlnet"]
    part, other = found.part("controlnet"), expected.part("controlnet")
    assert part.config == other.config
    assert part.state.keys() == other.state.keys()
    assert all(torch.equal(tensor, other.state[name]) for name, tensor in part.state.items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_and_read_in_all_formats(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    found = read(folders[kind])
    config = found.part("controlnet").config
    assert isinstance(config, ControlNetConfig)
    assert (config.hint_widths, config.global_pool) == ((4, 6, 8), kind == "sd2")
    folder = save_single_network(found, tmp_path / "folder", "diffusers")
    assert_same(read(folder), found)
    again = ControlNetModel.from_pretrained(folder)
    original = peer(kind)
    assert {name: value for name, value in again.config.items() if not name.startswith("_")}.items() >= {
        name: getattr(original.config, name)
        for name in ("addition_embed_type", "global_pool_conditions", "projection_class_embeddings_input_dim")
    }.items()
    state = original.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    name = "shuffle.safetensors" if kind == "sd2" else "canny.safetensors"  # whether it is pooled
    file = save_single_network(found, tmp_path / name, "ldm")
    names = [*load_file(file)]
    assert "input_hint_block.0.weight" in names
    assert "zero_convs.0.0.weight" in names
    assert "middle_block_out.0.weight" in names
    assert_same(read(file), found)


def test_single_files_may_have_a_prefix_or_the_names_of_a_folder(
    file: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = read(folders["sd1"])
    prefixed = {PREFIX + name: tensor for name, tensor in load_file(file).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    assert_same(read(tmp_path / "prefixed.safetensors"), found)
    torch.save({"state_dict": prefixed}, tmp_path / "pickle.pth")
    assert_same(read(tmp_path / "pickle.pth"), found)
    names_of_folder = load_file(folders["sd1"] / "diffusion_pytorch_model.safetensors")
    save_file(names_of_folder, tmp_path / "named.safetensors")
    assert_same(read(tmp_path / "named.safetensors"), found)


def test_a_file_may_hold_a_complete_model_as_well(file: Path, tmp_path: Path) -> None:
    """As the first files of the original repository do; the model is read without the ControlNet."""
    model = tiny_model(
        conditioner={"kind": "text", "tower": {"width": 64, "layers": 1, "heads": 1, "activation": "quick_gelu"}},
        first_stage={"kind": "autoencoder_kl", "widths": [32, 32], "blocks": 1},
        denoiser={"kind": "unet", "levels": [{"width": 32, "blocks": 1, "depth": 1}], "heads": 8, "context_width": 64}
        | {"projection": "conv"},
    )
    tensors = load_file(save(model, tmp_path / "model.safetensors", "ldm"))
    prefixed = {PREFIX + name: tensor for name, tensor in load_file(file).items()}
    save_file(tensors | prefixed, tmp_path / "complete.safetensors")
    found = read(tmp_path / "complete.safetensors")
    assert "controlnet" in found.parts
    assert any("is not part of the model" in note for note in found.notes)
    save_file(tensors, tmp_path / "bare.safetensors")
    plain, complete = (load(tmp_path / name) for name in ("bare.safetensors", "complete.safetensors"))
    assert plain.fingerprint == complete.fingerprint


def refused(path: Path, tensors: Mapping[str, Tensor]) -> str:
    save_file(dict(tensors), path)
    with pytest.raises(CheckpointError) as error_info:
        read(path)
    return str(error_info.value)


def test_unknown_missing_and_misshapen_weights_are_refused(file: Path, tmp_path: Path) -> None:
    tensors, broken = load_file(file), tmp_path / "broken.safetensors"
    assert "1 unexpected (zero_convs.9.0.weight)" in refused(broken, tensors | {"zero_convs.9.0.weight": torch.ones(2)})
    without = {name: tensor for name, tensor in tensors.items() if name != "middle_block_out.0.bias"}
    assert "1 missing (middle_block_out.0.bias)" in refused(broken, without)
    other = tensors | {"zero_convs.1.0.weight": torch.ones(3, 3, 1, 1)}
    assert "of a shape that does not fit" in refused(broken, other)
    misread = {name: tensor for name, tensor in tensors.items() if not name.startswith("input_hint_block.0")}
    assert "cannot be inferred" in refused(broken, misread)
    assert "have 5 channels" in refused(broken, tensors | {"input_hint_block.0.weight": torch.ones(4, 5, 3, 3)})


@pytest.mark.parametrize(
    "change",
    [
        {"conditioning_embedding_out_channels": []},
        {"conditioning_embedding_out_channels": [4, "six", 8]},
        {"conditioning_embedding_out_channels": None},
        {"conditioning_embedding_out_channels": [4] * 5000},
        {"conditioning_channels": 7},
        {"conditioning_channels": 10**9},
        {"controlnet_conditioning_channel_order": "bgr"},
        {"down_block_types": [3, None]},
        {"down_block_types": ["CrossAttnDownBlock2D"] * 3},
        {"down_block_types": "x"},
        {"block_out_channels": [10**9, 10**9]},
        {"block_out_channels": None},
        {"addition_embed_type": "text"},
        {"addition_embed_type": "text_time", "addition_time_embed_dim": []},
        {"cross_attention_dim": "wide"},
        {"layers_per_block": 10**7},
        {"act_fn": "gelu"},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_config_that_is_damaged_is_refused_in_a_sentence(
    change: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(folders["sd1"] / weights)
    config = json.loads((folders["sd1"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError) as error_info:
        read(tmp_path)
    assert str(error_info.value).count("\n") == 0
    assert str(tmp_path) in str(error_info.value)


LEVELS = (LevelSpec(320, 2, 1), LevelSpec(640, 2, 1), LevelSpec(1280, 2, 1), LevelSpec(1280, 2, 0))
PUBLISHED: dict[str, tuple[dict[str, Any], UNetConfig, int]] = {
    "sd1": (
        {"cross_attention_dim": 768},
        UNetConfig(levels=LEVELS, context_width=768, heads=8, projection="conv"),
        361_279_120,
    ),
    "sdxl": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        UNetConfig(
            levels=(LevelSpec(320, 2, 0), LevelSpec(640, 2, 2), LevelSpec(1280, 2, 10)),
            middle_depth=10,
            context_width=2048,
            vector_width=2816,
            head_width=64,
        ),
        1_251_014_160,
    ),
}
"""Settings of diffusers for published ControlNets, the config that they stand for, and the number of parameters."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_names_and_shapes_of_the_full_size_are_those_of_diffusers(kind: str) -> None:
    theirs, encoder, parameters = PUBLISHED[kind]
    with torch.device("meta"):
        other = ControlNetModel(**theirs)
        config = ControlNetFolder().read_config(dict(other.config), (), "config.json")
        network = config.build()
    assert config.encoder == encoder
    assert sum(each.numel() for each in network.parameters()) == parameters
    state = network.state_dict()
    folder = ControlNetFolder().key_table(config, state, dict(other.config))
    assert {folder[name].name: each.shape for name, each in state.items()} == {
        name: each.shape for name, each in other.state_dict().items()
    }
    file = ControlNetSingleFile().key_table(config, state, {})
    assert ControlNetSingleFile().infer_config({file[name].name: each for name, each in state.items()}, "x") == config
