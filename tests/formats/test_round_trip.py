"""From one format to another and back: the same tensors, bit for bit."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import Pipeline, load
from ldm.errors import CheckpointError
from ldm.formats import save
from ldm.formats.tensors import read_metadata
from ldm.model import LatentDiffusion
from tests.formats import world
from tests.tiny import TOKENIZER, tiny_model

SETTINGS = {"seed": 3, "output_type": "pt", "progress": False, "num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentDiffusion]:
    root = tmp_path_factory.mktemp("world")
    found = {}
    for kind in world.KINDS:
        world.pipeline(kind).save_pretrained(root / kind)
        found[kind] = load(root / kind)
    return found


def assert_same(model: LatentDiffusion, other: LatentDiffusion) -> None:
    assert model.config == other.config
    assert model.tokenizer is not None
    assert other.tokenizer is not None
    assert model.tokenizer.fingerprint() == other.tokenizer.fingerprint()
    state, again = model.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize(
    "by", [("native", "ldm"), ("native", "diffusers"), ("ldm", "diffusers", "ldm"), ("diffusers",)]
)
@pytest.mark.parametrize("kind", world.KINDS)
def test_every_tensor_comes_back(
    kind: str, by: tuple[str, ...], models: dict[str, LatentDiffusion], tmp_path: Path
) -> None:
    model = models[kind]
    for number, to in enumerate(by):
        model = load(save(model, tmp_path / str(number), to))
    assert_same(models[kind], model)
    assert model.fingerprint == models[kind].fingerprint


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_half_precision_stays_as_it_is(to: str, models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    half = load(save(models["sd1"], tmp_path / "half", "native", torch.float16), dtype=None)
    again = load(save(half, tmp_path / "other", to), dtype=None)
    assert_same(half, again)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float16}
    assert again.first_stage.latent_std.dtype == torch.float32


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_statistics_of_each_channel_are_folded_into_the_autoencoder(to: str, tmp_path: Path) -> None:
    """The file reads as one with a single scale, and makes the same images."""
    model = tiny_model()
    assert len(model.first_stage.latent_std.unique()) == 4
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = load(save(model, tmp_path / "other", to))
    assert replace(other.config.sampling, offset=0) == model.config.sampling  # which is of the spacing leading alone
    assert not other.first_stage.latent_mean.any()
    assert torch.allclose(1 / other.first_stage.latent_std, torch.tensor(0.18215))
    settings = SETTINGS | {"num_images_per_prompt": 2}
    pictures, again = (Pipeline(each)("a red car", **settings) for each in (model, other))
    assert (pictures - again).abs().max() < 1 / 255
    with torch.no_grad():
        latent, latent_again = model.encode(picture), other.encode(picture)
        posterior, posterior_again = model.first_stage.encode(picture), other.first_stage.encode(picture)
    assert torch.allclose(latent, latent_again, atol=1e-4)
    deviations = (each.std / network.first_stage.latent_std[:, None, None] for each, network in
                  ((posterior, model), (posterior_again, other)))  # fmt: skip
    assert torch.allclose(*deviations, atol=1e-4)


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_folder_in_half_precision_opens_in_diffusers_as_it_is(
    kind: str, models: dict[str, LatentDiffusion], tmp_path: Path
) -> None:
    folder = save(models[kind], tmp_path / "half", "diffusers", torch.float16)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red car", height=32, width=32, num_inference_steps=1, output_type="np").images
    assert picture.std() > 0.05


def test_an_ldm_file_says_all_of_itself(tmp_path: Path) -> None:
    model = tiny_model()
    model.provenance = {"steps": 7}
    model.first_stage.latent_preview = torch.rand(3, 5)
    file = save(model, tmp_path / "one.safetensors", "ldm")
    metadata, again = read_metadata(file), load(file)
    assert json.loads(metadata["config"])["diffusion"]["parametrization"]["kind"] == "v"
    assert metadata["modelspec.prediction_type"] == "v"
    assert json.loads(metadata["latents"])["before_folding"]["mean"] == model.first_stage.latent_mean.tolist()
    assert again.config == model.config
    assert again.provenance == {"steps": 7}
    assert again.fingerprint == metadata["fingerprint"]
    assert again.tokenizer is not None
    assert torch.equal(again.tokenizer("a red car"), TOKENIZER("a red car"))
    assert torch.equal(again.first_stage.latent_preview, model.first_stage.latent_preview)


def test_an_ldm_file_that_was_changed_tells_so(tmp_path: Path) -> None:
    """And one that was not says nothing, also if a preview was fitted before it was written."""
    model = tiny_model()
    model.preview(torch.zeros(1, *model.latent_shape()))
    file = save(model, tmp_path / "one.safetensors", "ldm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(file).fingerprint == read_metadata(file)["fingerprint"]
    tensors, metadata = load_file(file), read_metadata(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "changed.safetensors", metadata)
    with pytest.warns(UserWarning, match="its weights are not those that it was written with"):
        assert load(tmp_path / "changed.safetensors").fingerprint != metadata["fingerprint"]


def test_what_a_format_has_no_place_for_is_said(tmp_path: Path) -> None:
    for to in ("ldm", "diffusers"):
        with pytest.raises(CheckpointError, match=r"has no place for|attends to a context"):
            save(tiny_model("class"), tmp_path / to, to)
    with pytest.raises(CheckpointError, match="no format 'onnx'; choose one of native, ldm, diffusers"):
        save(tiny_model(), tmp_path / "x", "onnx")
    with pytest.raises(CheckpointError, match="is not a folder, which diffusers needs"):
        save(tiny_model(), tmp_path / "x.safetensors", "diffusers")


def test_where_nothing_can_be_read_again_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.ckpt would be a pickle"):
        save(tiny_model(), tmp_path / "x.ckpt", "ldm")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a diffusers folder, which would hide"):
        save(tiny_model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be written to \("):
        save(tiny_model(), tmp_path / "model_index.json" / "x.safetensors")
