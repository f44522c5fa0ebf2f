"""LDM files as the world has them: without metadata, with averaged weights, pruned, in half precision, as pickles, lone parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import Pipeline, load
from ldm.clip.tokenizer import CLIPBPEConfig
from ldm.config import from_dict
from ldm.diffusion.parametrization import Eps, V
from ldm.errors import CheckpointError
from ldm.formats import read, save
from ldm.formats.single_file import EMA
from ldm.model import LatentDiffusion, ModelConfig

KINDS = ("SD 1", "SD 2", "SDXL")
SETTINGS = {"seed": 3, "output_type": "pt", "progress": False, "num_inference_steps": 2, "height": 16, "width": 16}
TOWER: dict[str, Any] = {"width": 64, "layers": 2, "heads": 1}
PENULTIMATE = {"hidden_state": "penultimate"}
CONDITIONERS: dict[str, dict[str, Any]] = {
    "SD 1": {"kind": "text", "tower": TOWER | {"activation": "quick_gelu"}},
    "SD 2": {"kind": "text", "tower": TOWER | PENULTIMATE},
    "SDXL": {
        "kind": "sdxl",
        "first": TOWER | PENULTIMATE | {"activation": "quick_gelu", "context_norm": False},
        "second": TOWER | PENULTIMATE | {"embed_dim": 64, "context_norm": False},
    },
}
UNET, VAE, OPENAI = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
UNETS: dict[str, dict[str, Any]] = {
    "SD 1": {"heads": 8, "projection": "conv", "context_width": 64},
    "SD 2": {"head_width": 64, "context_width": 64},
    "SDXL": {"head_width": 64, "context_width": 128, "vector_width": 64 + 6 * 256},
}
SAMPLING: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 7.5, "spacing": "leading"}
SAMPLINGS = {
    "SD 1": SAMPLING | {"offset": 1, "final": "sigma_min"},
    "SD 2": SAMPLING | {"offset": 1, "final": "sigma_min"},
    "SDXL": SAMPLING | {"sampler": "euler", "guidance_scale": 5.0, "offset": 1},
}


def model_of(kind: str, conditioner: Any = None, **unet: Any) -> LatentDiffusion:
    """A model of ours that is what a file of this kind is taken for, but for its widths and depths."""
    config = {
        "first_stage": {
            "kind": "autoencoder_kl",
            "widths": [32, 32],
            "blocks": 1,
            "overflows_fp16": kind == "SDXL",  # files do not say so; diffusers assumes it, too (force_upcast)
        },
        "conditioner": conditioner or CONDITIONERS[kind],
        "denoiser": {"kind": "unet", "levels": [{"width": 64, "blocks": 1, "depth": 1}, {"width": 64, "blocks": 1}]}
        | UNETS[kind]
        | unet,
        "diffusion": {"schedule": "scaled_linear", "parametrization": "eps"},
        "size": [1024, 1024] if kind == "SDXL" else [512, 512],
        "sampling": SAMPLINGS[kind],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = CLIPBPEConfig(pad_id=0 if kind == "SD 2" else None).build()
        model = LatentDiffusion(from_dict(ModelConfig, config), tokenizer)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.first_stage.latent_std.fill_(1 / (0.13025 if kind == "SDXL" else 0.18215))
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, LatentDiffusion]:
    return {kind: model_of(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def files(models: dict[str, LatentDiffusion], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Without a word of metadata."""
    root, bare = tmp_path_factory.mktemp("files"), {}
    for kind, model in models.items():
        bare[kind] = root / f"{kind}.safetensors"
        save_file(load_file(save(model, root / "own.safetensors", "ldm")), bare[kind])
    return bare


def changed(files: dict[str, Path], path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file({name: tensor.clone() for name, tensor in change(load_file(files["SD 1"])).items()}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_known_by_its_names_and_shapes(
    kind: str, models: dict[str, LatentDiffusion], files: dict[str, Path]
) -> None:
    found, expected = read(files[kind]), models[kind]
    assert found.kind == kind
    assert found.config() == expected.config
    assert not found.unused
    loaded = found.build()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    pictures = [Pipeline(each)("a red apple!", **SETTINGS) for each in (expected, loaded)]
    assert torch.allclose(*pictures, atol=1e-4)


def test_a_pickle_is_the_same(models: dict[str, LatentDiffusion], files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": load_file(files["SD 1"]), "global_step": 470_000, "epoch": 3}, path)
    loaded, expected = load(path), models["SD 1"].state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.state_dict().items())


def test_averaged_weights_are_taken_unless_asked_not_to(files: dict[str, Path], tmp_path: Path) -> None:
    def with_average(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        unet = {name.removeprefix("model."): each for name, each in tensors.items() if name.startswith(UNET)}
        averaged = {EMA + name.replace(".", ""): tensor + 1 for name, tensor in unet.items()}
        return tensors | averaged | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}

    path = changed(files, tmp_path / "full.safetensors", with_average)
    with_ema, without, emaonly = load(path), load(path, ema=False), load(files["SD 1"])
    for name, tensor in emaonly.denoiser.state_dict().items():
        assert torch.equal(with_ema.denoiser.state_dict()[name], tensor + 1)
        assert torch.equal(without.denoiser.state_dict()[name], tensor)
    assert any("EMA weights" in note for note in read(path).notes)


def test_what_no_network_needs_is_ignored_by_name_and_told(files: dict[str, Path], tmp_path: Path) -> None:
    position_ids = f"{OPENAI}text_model.embeddings.position_ids"
    extra = {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000), position_ids: torch.arange(77)[None]}
    path = changed(files, tmp_path / "pruned.safetensors", lambda tensors: tensors | extra)
    assert set(read(path).unused) == set(extra)
    load(path)


def test_the_infix_of_the_text_tower_may_lack(files: dict[str, Path], tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace(f"{OPENAI}text_model.", OPENAI): tensor for name, tensor in tensors.items()}

    path = changed(files, tmp_path / "old.safetensors", without)
    assert load(path).fingerprint == load(files["SD 1"]).fingerprint


def test_a_scale_in_the_file_is_taken(files: dict[str, Path], tmp_path: Path) -> None:
    path = changed(
        files, tmp_path / "scaled.safetensors", lambda tensors: tensors | {"scale_factor": torch.tensor(0.5)}
    )
    assert (load(path).first_stage.latent_std == 2).all()


@pytest.mark.parametrize("scale", [[0.5, 0.5], 0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale: Any, files: dict[str, Path], tmp_path: Path) -> None:
    wrong = {"scale_factor": torch.tensor(scale)}
    path = changed(files, tmp_path / "scaled.safetensors", lambda tensors: tensors | wrong)
    with pytest.raises(CheckpointError, match=r"scaled\.safetensors: scale_factor is .*, not one number above 0"):
        load(path)


def test_the_prediction_type_is_asked_for_or_told(files: dict[str, Path], tmp_path: Path) -> None:
    tensors, path = load_file(files["SD 1"]), tmp_path / "v.safetensors"
    assert load(files["SD 1"]).diffusion.parametrization == Eps()
    assert load(files["SD 1"], prediction_type="v_prediction").diffusion.parametrization == V()
    save_file(tensors, path, {"modelspec.prediction_type": "v"})
    assert load(path).diffusion.parametrization == V()
    assert load(path, prediction_type="epsilon").diffusion.parametrization == Eps()
    save_file(tensors | {"v_pred": torch.zeros(1)}, path)
    assert load(path).diffusion.parametrization == V()
    assert any("v_pred" in note for note in read(path).notes)
    with pytest.raises(CheckpointError, match="unknown prediction_type 'w'; "):
        load(path, prediction_type="w")


@pytest.mark.parametrize("prefix", ["", VAE])
def test_a_lone_vae_replaces_one(prefix: str, files: dict[str, Path], tmp_path: Path) -> None:
    """With or without its prefix, and with the discriminator of its training."""

    def alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name.replace(VAE, prefix): tensor + 1 for name, tensor in tensors.items() if name.startswith(VAE)}
        return own | ({f"{VAE}loss.logvar": torch.zeros(())} if prefix else {})

    path = changed(files, tmp_path / "vae.safetensors", alone)
    with pytest.raises(
        CheckpointError, match=r"is not a complete model: it lacks denoiser and text_encoder; name one that has them"
    ):
        load(path)
    model, own = load(files["SD 1"], vae=path), load(files["SD 1"])
    assert torch.equal(model.first_stage.decoder.conv_in.weight, own.first_stage.decoder.conv_in.weight + 1)
    assert torch.equal(model.denoiser.conv_in.weight, own.denoiser.conv_in.weight)
    assert model.fingerprint != own.fingerprint


def test_a_lone_vae_keeps_the_scale_that_the_unet_was_trained_with(files: dict[str, Path], tmp_path: Path) -> None:
    """0.13025 in SDXL, which a file of a VAE does not say; one that says another is believed."""
    tensors = {name: each for name, each in load_file(files["SDXL"]).items() if name.startswith(VAE)}
    save_file(tensors, tmp_path / "vae.safetensors")
    save_file(tensors | {"scale_factor": torch.tensor(0.5)}, tmp_path / "told.safetensors")
    own = load(files["SDXL"])
    assert load(files["SDXL"], vae=tmp_path / "vae.safetensors").fingerprint == own.fingerprint
    assert (load(files["SDXL"], vae=tmp_path / "told.safetensors").first_stage.latent_std == 2).all()


def test_a_unet_brings_what_it_estimates(files: dict[str, Path], tmp_path: Path) -> None:
    """If its source says that; else it is as of the model whose part it replaces."""
    path, tensors = tmp_path / "v.safetensors", load_file(files["SD 1"])
    save_file(tensors, path, {"modelspec.prediction_type": "v"})
    assert load(files["SD 1"], denoiser=path).diffusion.parametrization == V()
    assert load(path, denoiser=files["SD 1"]).diffusion.parametrization == V()
    assert load(path, denoiser=files["SD 1"], prediction_type="epsilon").diffusion.parametrization == Eps()


def test_text_encoders_may_come_from_elsewhere(files: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        whole, path = load_file(files[kind]), tmp_path / f"{kind}.safetensors"
        save_file({name: each for name, each in whole.items() if name.startswith((UNET, VAE))}, path)
        assert load(path, text_encoder=files[kind]).fingerprint == load(files[kind]).fingerprint
    with pytest.raises(CheckpointError, match="has no second text encoder; name a complete SDXL model"):
        load(files["SD 1"], text_encoder_2=files["SD 2"])


@pytest.mark.parametrize("part", ["denoiser", "text_encoder"])
def test_other_lone_networks_replace_theirs(part: str, files: dict[str, Path], tmp_path: Path) -> None:
    prefix = {"denoiser": UNET, "text_encoder": OPENAI}[part]

    def alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor + 1 for name, tensor in tensors.items() if name.startswith(prefix)}

    path = changed(files, tmp_path / "lone.safetensors", alone)
    model, own = load(files["SD 1"], **{part: path}).state_dict(), load(files["SD 1"]).state_dict()
    home = {"denoiser": "denoiser.", "text_encoder": "conditioner."}[part]
    for name, tensor in own.items():
        assert torch.equal(model[name], tensor + 1 if name.startswith(home) else tensor), name


def test_a_text_encoder_of_another_depth_is_read_where_the_unet_attends(files: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' folder of SD 2 is without the last block, whose output the U-Net never saw."""
    model = load(files["SD 2"])
    folder = save(model, tmp_path / "folder", "diffusers")
    replaced = load(files["SD 2"], text_encoder=folder / "text_encoder")
    assert (len(model.conditioner.tower.blocks), len(replaced.conditioner.tower.blocks)) == (2, 1)
    told = {"text": ["a red apple"]}
    assert torch.equal(model.conditioner(told).context, replaced.conditioner(told).context)
    back = load(folder, text_encoder=files["SD 2"])
    assert torch.equal(model.conditioner(told).context, back.conditioner(told).context)


def test_nine_channels_are_for_inpainting(tmp_path: Path) -> None:
    parts = {"text": CONDITIONERS["SD 1"], "inpaint": {"kind": "inpaint"}}
    model = model_of("SD 1", conditioner={"kind": "several", "parts": parts}, in_channels=9)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(save(model, tmp_path / "own.safetensors", "ldm")), bare)
    found = read(bare)
    assert found.config() == model.config
    assert found.build().fingerprint == load(tmp_path / "own.safetensors").fingerprint


def test_what_does_not_fit_is_named_by_its_key(files: dict[str, Path], tmp_path: Path) -> None:
    key, path = f"{UNET}input_blocks.1.0.in_layers.0.weight", tmp_path / "wrong.safetensors"
    changed(files, path, lambda tensors: {name: each for name, each in tensors.items() if name != key})
    with pytest.raises(
        CheckpointError, match=r"wrong\.safetensors .*1 missing \(input_blocks\.1\.0\.in_layers\.0\.weight\)"
    ):
        load(path)
    changed(files, path, lambda tensors: tensors | {key: torch.zeros(3)})
    with pytest.raises(
        CheckpointError, match=r"shape that does not fit \(input_blocks\.1\.0\.in_layers\.0\.weight \[3\]\)"
    ):
        load(path)
    changed(files, path, lambda tensors: tensors | {f"{UNET}adapter.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(adapter\.weight\)"):
        load(path)
    changed(files, path, lambda tensors: tensors | {key: tensors[key] * float("nan")})
    with pytest.raises(CheckpointError, match=r"down\.0\.residual\.norm1\.weight holds NaN"):
        load(path)
    for name in ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "unet.conv_in.lora_A.weight"):
        save_file({name: torch.zeros(2, 2)}, path)
        with pytest.raises(CheckpointError, match=r"is a LoRA, not a model; .* with Pipeline\.load_lora or --lora"):
            load(path)
    torch.save({"state_dict": {"model.denoiser.conv_in.bias": torch.zeros(2)}}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is a training checkpoint .* name its run folder"):
        load(tmp_path / "last.ckpt")
    save_file({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="is the refiner of SDXL, which ldm does not read"):
        load(path)
    save_file({"a.b": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"holds no network that ldm knows \(its first name is 'a\.b'\)"):
        load(path)
