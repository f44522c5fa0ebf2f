"""Writers demand what readers demand: what was written can be read again, and what could not be read is not written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from ldm import Pipeline, load
from ldm.clip.image import ViTConfig
from ldm.clip.model import CLIP, CLIPConfig
from ldm.clip.text import TextTowerConfig
from ldm.errors import CheckpointError, LdmError, SamplingError
from ldm.formats import FORMATS, read, save
from ldm.formats.clip import load_clip, save_clip
from ldm.formats.lora import read_lora, write_lora
from ldm.formats.native import FIRST_STAGE, save_module
from ldm.formats.single_network import save_single_network
from ldm.formats.tensors import read_metadata, write_tensors
from ldm.model import LatentDiffusion
from ldm.nn.lora import new_lora
from tests.tiny import tiny_model

PATHS = {"native": "model.safetensors", "ldm": "model.safetensors", "diffusers": "folder"}


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def compiled_in_parts(model: Any) -> nn.Module:
    model.denoiser = compiled(model.denoiser)
    model.first_stage.decoder = compiled(model.first_stage.decoder)
    model.conditioner.tower = compiled(model.conditioner.tower)
    return model


def parallel_in_parts(model: Any) -> nn.Module:
    model.denoiser = nn.DataParallel(model.denoiser)
    model.first_stage = compiled(model.first_stage)
    model.conditioner.tower.blocks[0] = compiled(nn.DataParallel(model.conditioner.tower.blocks[0]))
    return model


WRAPPED: list[Callable[[LatentDiffusion], nn.Module]] = [
    compiled_in_parts,
    parallel_in_parts,
    compiled,
    nn.DataParallel,
    lambda model: compiled(nn.DataParallel(compiled_in_parts(model))),
]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_model_is_written_like_the_plain_one(
    wrap: Callable[[LatentDiffusion], nn.Module], to: str, tmp_path: Path
) -> None:
    expected = load(save(tiny_model(), tmp_path / "plain" / PATHS[to], to))
    again = load(save(wrap(tiny_model()), tmp_path / "wrapped" / PATHS[to], to))
    assert again.fingerprint == expected.fingerprint
    assert again.config == expected.config


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_file_with_the_names_of_a_wrapper_is_read(prefix: str, tmp_path: Path) -> None:
    for to in ("native", "ldm"):
        path = save(tiny_model(), tmp_path / f"{to}.safetensors", to)
        names = {prefix + name: tensor for name, tensor in load_file(path).items()}
        save_file(names, tmp_path / "wrapped.safetensors", read_metadata(path))
        assert load(tmp_path / "wrapped.safetensors").fingerprint == load(path).fingerprint


def with_weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model.denoiser.conv_in)


def with_old_weight_norm(model: Any) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.first_stage.decoder.conv_in)


def of_another_shape(model: Any) -> None:
    model.denoiser = tiny_model(denoiser=tiny_denoiser(width=32)).denoiser


def tiny_denoiser(width: int) -> dict[str, Any]:
    level = {"width": width, "blocks": 1, "depth": 1}
    return {"kind": "unet", "levels": [level], "heads": 2, "groups": 4, "context_width": 16}


def with_another_layer(model: Any) -> None:
    model.denoiser.add_module("extra", nn.Linear(2, 2))


def without_values(model: Any) -> None:
    model.first_stage.to("meta")


def with_integers(model: Any) -> None:
    weight = model.denoiser.conv_in.weight
    model.denoiser.conv_in.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)


def quantized(model: Any) -> None:
    block = model.conditioner.tower.blocks[0]
    block.fc1 = torch.ao.nn.quantized.dynamic.Linear(block.fc1.in_features, block.fc1.out_features)


def sparse(model: Any) -> None:
    fc = model.conditioner.tower.blocks[0].fc1
    fc.weight = nn.Parameter(fc.weight.detach().to_sparse(), requires_grad=False)


def not_finite(model: Any) -> None:
    with torch.no_grad():
        model.first_stage.decoder.conv_in.weight[0, 0, 0, 0] = float("nan")


UNREADABLE: list[tuple[Callable[[LatentDiffusion], None], str]] = [
    (with_weight_norm, "does not fit its config: 1 missing"),
    (with_old_weight_norm, "does not fit its config: 1 missing"),
    (of_another_shape, "of another shape"),
    (with_another_layer, "2 unexpected"),
    (without_values, "on the meta device"),
    (with_integers, "of another kind of number"),
    (quantized, "is of type dtype, not a plain dense tensor"),
    (sparse, "not a plain dense tensor"),
    (not_finite, "holds NaN or infinite values in float32"),
]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(("change", "message"), UNREADABLE)
def test_what_could_not_be_read_again_is_refused_before_anything_is_written(
    change: Callable[[LatentDiffusion], None], message: str, to: str, tmp_path: Path
) -> None:
    model = tiny_model()
    change(model)
    with pytest.raises(CheckpointError, match=message) as error:
        save(model, tmp_path / PATHS[to], to)
    assert str(error.value).startswith("nothing is written to ")
    assert not [*tmp_path.rglob("*")]


@pytest.mark.parametrize("to", FORMATS)
def test_weights_that_overflow_in_the_written_dtype_are_refused(to: str, tmp_path: Path) -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.denoiser.conv_out.bias[0] = 1e6
    with pytest.raises(
        CheckpointError, match=r"holds NaN or infinite values in float16; use .* a dtype of larger range"
    ):
        save(model, tmp_path / PATHS[to], to, torch.float16)
    assert not [*tmp_path.rglob("*")]
    load(save(model, tmp_path / PATHS[to], to, torch.bfloat16))


def test_a_folder_without_a_scheduler_is_not_begun(tmp_path: Path) -> None:
    model = tiny_model(diffusion={"schedule": "karras", "parametrization": "eps"})
    with pytest.raises(CheckpointError, match="diffusers has no scheduler"):
        save(model, tmp_path / "folder", "diffusers")
    assert not [*tmp_path.rglob("*")]


def test_a_module_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the model is a Linear; pass a LatentDiffusion"):
        save(compiled(nn.Linear(2, 2)), tmp_path / "model.safetensors")


def test_a_pipeline_takes_models_alone() -> None:
    with pytest.raises(CheckpointError, match="the model is a Linear; pass a LatentDiffusion"):
        Pipeline(cast(Any, compiled(nn.Linear(2, 2))))
    assert isinstance(Pipeline(cast(Any, compiled(tiny_model()))), Pipeline)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "fp16"])
def test_a_dtype_that_is_not_of_floats_is_refused(dtype: Any, tmp_path: Path) -> None:
    model = tiny_model()
    path = save(model, tmp_path / "model.safetensors")
    other = tmp_path / "other.safetensors"
    for call in (
        lambda: save(model, other, dtype=dtype),
        lambda: load(path, dtype=dtype),
        lambda: Pipeline.from_pretrained(path, "cpu", dtype),
        lambda: Pipeline(model).to(dtype=dtype),
    ):
        with pytest.raises(SamplingError, match=r"dtype is .*; give a floating-point dtype"):
            call()
    assert not other.exists()


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 300, "file/x"])
def test_a_path_that_cannot_be_written_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = name and f"{tmp_path}/{name}"
    with pytest.raises(LdmError, match=r"the path .* is (empty|invalid); name a file or folder|cannot be written to"):
        save(tiny_model(), path)


def test_a_stage_is_written_as_its_reader_demands(tmp_path: Path) -> None:
    stage: Any = tiny_model().first_stage
    path = tmp_path / "vae.safetensors"
    config = tiny_model().config.first_stage
    fingerprint = save_module(path, FIRST_STAGE, compiled(stage), config)
    assert read(path).fingerprint == fingerprint
    parametrizations.weight_norm(stage.decoder.conv_in)
    with pytest.raises(CheckpointError, match=r"nothing is written to .*other\.safetensors, .* 1 missing"):
        save_module(tmp_path / "other.safetensors", FIRST_STAGE, stage, config)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("to", ["native", "ldm", "diffusers"])
def test_a_single_network_of_a_broken_file_is_not_converted(to: str, tmp_path: Path) -> None:
    stage, path = tiny_model().first_stage, tmp_path / "vae.safetensors"
    save_module(path, FIRST_STAGE, stage, tiny_model().config.first_stage)
    found = read(path)
    state = {name: tensor for name, tensor in found.parts["first_stage"].state.items() if name != "quant_conv.bias"}
    found.parts["first_stage"].__dict__["state"] = state
    with pytest.raises(CheckpointError, match=r"nothing is written to .* 1 missing \(quant_conv\.bias\)"):
        save_single_network(found, tmp_path / ("out.safetensors" if to != "diffusers" else "out"), to)
    assert [*tmp_path.iterdir()] == [path]


def tiny_clip() -> CLIP:
    config = CLIPConfig(TextTowerConfig(300, 12, 16, 1, 2, 2.0, "gelu"), ViTConfig(16, 8, 16, 1, 2, 2.0, "gelu"), 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return config.build().eval()


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
def test_a_wrapped_clip_is_written_like_the_plain_one(to: Any, tmp_path: Path) -> None:
    clip: Any = tiny_clip()
    expected = clip.state_dict()
    clip.text = compiled(clip.text)
    save_clip(compiled(clip), None, tmp_path / "clip", to)
    again, _ = load_clip(tmp_path / "clip")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in expected.items())
    parametrizations.weight_norm(clip.image.patch_embedding)
    with pytest.raises(CheckpointError, match=r"nothing is written to .* 1 missing"):
        save_clip(clip, None, tmp_path / "broken", to)
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
@pytest.mark.parametrize("broken", ["values", "alpha", "shape"])
def test_a_lora_that_could_not_be_read_again_is_refused(broken: str, naming: str, tmp_path: Path) -> None:
    model = tiny_model()
    adapter = new_lora(model, rank=2)
    write_lora(tmp_path / "one.safetensors", adapter, model, naming)
    assert read_lora(tmp_path / "one.safetensors", model).layers.keys() == adapter.layers.keys()
    layer: Any = next(iter(adapter.layers.values()))
    if broken == "alpha":
        layer.alpha = float("nan")
    elif broken == "values":
        layer.up.data[0, 0] = float("inf")
    else:
        layer.up.data = layer.up.data[:-1]
    with pytest.raises(CheckpointError, match=r"nothing is written to .*two\.safetensors"):
        write_lora(tmp_path / "two.safetensors", adapter, model, naming)
    assert not (tmp_path / "two.safetensors").exists()


def test_any_tensor_file_is_checked(tmp_path: Path) -> None:
    for tensor in (torch.tensor([float("inf")]), torch.empty(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(CheckpointError, match="nothing is written to"):
            write_tensors(tmp_path / "x.safetensors", {"a": tensor}, {})
    assert not [*tmp_path.iterdir()]
