"""Marks of LDM files: what states the schedule, the prediction type or the latent statistics is read, or rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import Pipeline
from ldm.cli.convert import description
from ldm.diffusion import Diffusion, sigmas
from ldm.diffusion.parametrization import X0, Edm, EdmV, Eps, V
from ldm.diffusion.schedule import SIGMA_LIMIT, Cosine, Karras, Linear, ScaledLinear
from ldm.errors import CheckpointError
from ldm.formats import load, read, save
from ldm.formats.families import SD_1
from ldm.formats.marks import PLAYGROUND, Marks, read_marks, statistics_for, tensors_for, without_marks
from ldm.formats.single_network import save_single_network
from ldm.model import LatentDiffusion, SamplingConfig
from tests.formats.test_single_file import SETTINGS, model_of

ZERO_SNR = ScaledLinear(zero_terminal_snr=True)
EMPTY = torch.empty(0)
MEAN, STD = torch.tensor([-1.6574, 1.886, -1.383, 2.5155]), torch.tensor([8.4927, 5.9022, 6.5498, 5.2299])
COSXL = Diffusion(Karras(sigma_max=120.0), EdmV(1.0))


def marks_of(tensors: Mapping[str, Tensor], requested: str | None = None, **metadata: str) -> Marks:
    named = {name.replace("__", "."): value for name, value in metadata.items()}
    return read_marks("x.safetensors", without_marks(tensors, "x.safetensors")[0], named, requested)


STATED: list[tuple[dict[str, Tensor], dict[str, str], Diffusion]] = [
    ({}, {}, Diffusion()),
    ({"v_pred": EMPTY}, {}, Diffusion(parametrization=V())),
    ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, Diffusion(ZERO_SNR, V())),
    ({"ztsnr": torch.tensor(1)}, {}, Diffusion(ZERO_SNR, V())),
    ({"model.diffusion_model.v_pred": EMPTY, "model.diffusion_model.ztsnr": EMPTY}, {}, Diffusion(ZERO_SNR, V())),
    ({"edm_mean": MEAN.reshape(1, 4, 1, 1), "edm_std": STD.reshape(1, 4, 1, 1)}, {}, PLAYGROUND),
    ({"edm_vpred.sigma_max": torch.tensor(120.0)}, {}, COSXL),
    (
        {"edm_vpred.sigma_max": torch.tensor([80.0]).half(), "edm_vpred.sigma_min": torch.tensor(0.5)},
        {},
        Diffusion(Karras(sigma_min=0.5, sigma_max=80.0), EdmV(1.0)),
    ),
    ({"betas": ScaledLinear().betas}, {}, Diffusion()),
    ({"alphas_cumprod": ScaledLinear().alphas_cumprod.half()}, {}, Diffusion()),
    ({"alphas_cumprod": ScaledLinear().alphas_cumprod.bfloat16()}, {}, Diffusion()),
    ({"denoiser.sigmas": ScaledLinear().table.float().flip(0)}, {}, Diffusion()),
    ({"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)}, {}, Diffusion()),
    ({"betas": Linear(1000, False, 0.0015, 0.0195).betas.float()}, {}, Diffusion(Linear(1000, False, 0.0015, 0.0195))),
    ({"betas": ScaledLinear(500).betas.float()}, {}, Diffusion(ScaledLinear(500))),
    ({"alphas_cumprod": Cosine().alphas_cumprod.float()}, {}, Diffusion(Cosine())),
    ({"alphas_cumprod": ZERO_SNR.alphas_cumprod.float(), "betas": ScaledLinear().betas}, {}, Diffusion(ZERO_SNR, V())),
    ({}, {"modelspec__prediction_type": "v"}, Diffusion(parametrization=V())),
    ({}, {"modelspec__prediction_type": "V-Prediction"}, Diffusion(parametrization=V())),
    ({}, {"modelspec__prediction_type": "sample"}, Diffusion(parametrization=X0())),
    ({}, {"modelspec__predict_key": "v"}, Diffusion(parametrization=V())),
    ({}, {"modelspec__architecture": "stable-diffusion-v2-768-v"}, Diffusion(parametrization=V())),
    ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, Diffusion(ZERO_SNR, V())),
    ({}, {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"}, Diffusion()),
    ({"ztsnr": EMPTY}, {"modelspec__prediction_type": "v"}, Diffusion(ZERO_SNR, V())),
]


@pytest.mark.parametrize(("tensors", "metadata", "expected"), STATED)
def test_each_mark_is_read(tensors: dict[str, Tensor], metadata: dict[str, str], expected: Diffusion) -> None:
    found = marks_of(tensors, **metadata)
    assert found.diffusion == expected
    assert found.stated == (expected.parametrization != Eps() or "edm_mean" in tensors)


CONTRADICTORY: list[tuple[dict[str, Tensor], dict[str, str], str | None, str]] = [
    ({"ztsnr": EMPTY}, {"modelspec__prediction_type": "epsilon"}, None, "terminal SNR is zero by the tensor ztsnr"),
    ({"ztsnr": EMPTY, "v_pred": EMPTY}, {}, "epsilon", "predicts epsilon as requested, but the terminal SNR is zero"),
    (
        {"v_pred": EMPTY},
        {"modelspec__prediction_type": "epsilon"},
        None,
        "predicts eps by .*, but v by the tensor v_pred",
    ),
    ({}, {"modelspec__prediction_type": "flow"}, None, "modelspec.prediction_type is 'flow', which ldm does not know"),
    ({"edm_mean": MEAN}, {}, None, "edm_mean and edm_std are not a finite mean"),
    ({"edm_mean": MEAN, "edm_std": STD[:3]}, {}, None, "edm_mean and edm_std are not"),
    ({"edm_mean": MEAN, "edm_std": -STD}, {}, None, "edm_mean and edm_std are not"),
    ({"edm_vpred.sigma_min": torch.tensor(1.0)}, {}, None, "no edm_vpred.sigma_max"),
    ({"edm_vpred.sigma_max": torch.tensor(float("nan"))}, {}, None, "does not give two noise levels"),
    ({"edm_vpred.sigma_max": torch.tensor([1.0, 2.0])}, {}, None, "does not give two noise levels"),
    ({"edm_vpred.sigma_max": torch.tensor(0.001)}, {}, None, "does not give two noise levels"),
    (
        {"edm_mean": MEAN, "edm_std": STD, "edm_vpred.sigma_max": torch.tensor(1.0)},
        {},
        None,
        "predicts v by .*, but eps",
    ),
    ({"edm_vpred.sigma_data": torch.tensor(1.0)}, {}, None, "holds edm_vpred.sigma_data, which ldm does not know"),
    ({"x0_pred": EMPTY}, {}, None, "holds x0_pred, which ldm does not know"),
    ({"betas": torch.linspace(0.1, 0.9, 50) ** 3}, {}, None, r"noise schedule \(betas, of 50 timesteps\) is none"),
    ({"alphas_cumprod": torch.full((1000,), float("nan"))}, {}, None, "is none that ldm knows"),
    ({"betas": torch.ones(1)}, {}, None, "is none that ldm knows"),
]


@pytest.mark.parametrize(("tensors", "metadata", "requested", "message"), CONTRADICTORY)
def test_a_mark_without_meaning_is_rejected(
    tensors: dict[str, Tensor], metadata: dict[str, str], requested: str | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        marks_of(tensors, requested, **metadata)
    assert "x.safetensors" in str(error.value)


def test_a_request_decides_a_contradiction() -> None:
    metadata = {"modelspec__prediction_type": "epsilon"}
    assert marks_of({"v_pred": EMPTY}, "v_prediction", **metadata).diffusion == Diffusion(parametrization=V())
    assert marks_of({"ztsnr": EMPTY}, "v_prediction", **metadata).diffusion == Diffusion(ZERO_SNR, V())
    assert marks_of({}, "v_prediction", modelspec__prediction_type="flow").diffusion == Diffusion(parametrization=V())


@pytest.mark.parametrize(
    "diffusion", [each for _, _, each in STATED if each.parametrization != X0() and each != PLAYGROUND]
)
def test_what_is_written_reads_as_the_same_diffusion(diffusion: Diffusion) -> None:
    assert marks_of(tensors_for(diffusion)).diffusion == diffusion


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return model_of("SD 1")


def trained_for(model: LatentDiffusion, diffusion: Diffusion) -> LatentDiffusion:
    """Change the diffusion of a model, its sampling defaults and latent statistics to those of files with such marks."""
    first_stage: Any = model.first_stage
    first_stage.latent_mean.copy_(MEAN if diffusion == PLAYGROUND else torch.zeros(4))
    first_stage.latent_std.copy_(STD * 2 if diffusion == PLAYGROUND else torch.full((4,), 1 / 0.18215))
    marks = tensors_for(diffusion) | statistics_for(diffusion, first_stage.state_dict())
    model.config = replace(model.config, diffusion=diffusion, sampling=marks_of(marks).sampling(SD_1.sampling))
    model.diffusion = diffusion
    return model


@pytest.mark.parametrize("diffusion", [Diffusion(ZERO_SNR, V()), PLAYGROUND, COSXL])
def test_a_file_without_metadata_generates_the_same_images(
    diffusion: Diffusion, model: LatentDiffusion, tmp_path: Path
) -> None:
    trained_for(model, diffusion)
    file = save(model, tmp_path / "own.safetensors", "ldm")
    save_file(load_file(file), tmp_path / "bare.safetensors")
    found = read(tmp_path / "bare.safetensors")
    assert found.diffusion == diffusion
    assert found.unused == ()
    assert set(found.marks) >= tensors_for(diffusion).keys()
    again = found.build()
    for name in ("latent_mean", "latent_std"):
        assert torch.equal(getattr(again.first_stage, name), getattr(model.first_stage, name))
    settings = {**SETTINGS, "spacing": "karras" if isinstance(diffusion.schedule, Karras) else "trailing"}
    images = [Pipeline(each)("a red apple!", **settings) for each in (model, again)]
    assert torch.equal(*images)


def test_a_report_lists_all_marks(model: LatentDiffusion, tmp_path: Path) -> None:
    tensors = load_file(save(trained_for(model, PLAYGROUND), tmp_path / "own.safetensors", "ldm"))
    save_file(tensors, tmp_path / "bare.safetensors", {"modelspec.prediction_type": "epsilon"})
    printed = description(read(tmp_path / "bare.safetensors"))
    for name in ("edm_mean", "edm_std", "modelspec.prediction_type"):
        assert f"mark             {name}" in printed
    assert "prediction type  edm, schedule karras" in printed


def test_latent_statistics_of_a_folder_are_those_of_the_marks(model: LatentDiffusion, tmp_path: Path) -> None:
    folder = load(save(trained_for(model, PLAYGROUND), tmp_path / "folder", "diffusers"))
    assert folder.diffusion == PLAYGROUND
    images = [Pipeline(each)("a red apple!", **{**SETTINGS, "spacing": "karras"}) for each in (model, folder)]
    assert torch.allclose(images[0], images[1], atol=2e-3)


def test_zero_terminal_snr_is_sampled_from_pure_noise() -> None:
    found = marks_of({"v_pred": EMPTY, "ztsnr": EMPTY})
    for usual in (SamplingConfig("euler", 20, 5.0, spacing, 1) for spacing in ("leading", "linspace")):
        sampling = found.sampling(usual)
        grid = sigmas(found.diffusion.schedule, 20, sampling.spacing, sampling.offset, sampling.final)
        assert grid[0] == SIGMA_LIMIT


def test_a_single_network_states_its_diffusion(model: LatentDiffusion, tmp_path: Path) -> None:
    whole = read(save(trained_for(model, COSXL), tmp_path / "own.safetensors", "ldm"))
    part = replace(whole, parts={"denoiser": whole.parts["denoiser"]})
    file = save_single_network(part, tmp_path / "unet.safetensors", "ldm")
    assert read(file).parts["denoiser"].diffusion == COSXL


def test_playground_statistics_of_other_channels_are_rejected(model: LatentDiffusion, tmp_path: Path) -> None:
    tensors = load_file(save(trained_for(model, Diffusion()), tmp_path / "own.safetensors", "ldm"))
    save_file(tensors | {"edm_mean": torch.zeros(16), "edm_std": torch.ones(16)}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="edm_mean and edm_std are of 16 channels, but the latents have 4"):
        read(tmp_path / "bare.safetensors")


def test_the_hidden_state_of_a_text_encoder_of_sd_1_is_read(model: LatentDiffusion, tmp_path: Path) -> None:
    tensors = load_file(save(trained_for(model, Diffusion()), tmp_path / "own.safetensors", "ldm"))
    for layer, state in (("1", "last"), ("2", "penultimate")):
        save_file(tensors, tmp_path / "bare.safetensors", {"modelspec.encoder_layer": layer})
        assert read(tmp_path / "bare.safetensors").parts["text_encoder"].config.hidden_state == state


def test_edm_parametrizations_differ_in_sign_alone() -> None:
    sigma = torch.tensor([0.1, 1.0, 10.0])
    for first, second in zip(Edm(1.0).scalings(sigma), EdmV(1.0).scalings(sigma), strict=True):
        assert torch.equal(first.abs(), second.abs())
    assert torch.allclose(EdmV(1.0).scalings(sigma).out, V().scalings(sigma).out)
