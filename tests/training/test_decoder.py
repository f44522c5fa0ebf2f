"""Stage 4: a tiny decoder is trained on the latents of a first stage, and reaches the model's file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm import load
from ldm.errors import ConfigError
from ldm.formats import read
from ldm.formats.native import DECODER, save_model, save_module
from ldm.pipeline import Pipeline
from ldm.training.costs import step_cost
from ldm.training.experiment import Experiment
from ldm.training.handoff import add_tiny_decoder, result_file
from ldm.training.stages import build_module, data_of, train_stage
from ldm.training.tasks.decoder import MIN_ERROR, DistillationLossConfig
from ldm.vae import TinyDecoderConfig
from ldm.vae.metrics import psnr
from tests.experiments import tiny_experiment
from tests.tiny import tiny_model

SECTION = (
    "decoder.model={widths: [8], blocks: 1, patch: 2}",
    "decoder.train={max_steps: 3, batch_size: 4, learning_rate: 2.0e-3, validate_every: 3, images_every: 3}",
)


def test_the_stage_is_trained_with_previews_and_metrics_and_on_cached_latents(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, *SECTION, "data.cache_latents=true", "vae.train.max_steps=1")
    train_stage(experiment, "vae")
    module = build_module(experiment, "decoder")
    batch = next(iter(data_of(experiment, module).train_dataloader()))
    encoded = module.task.first_stage.encode(batch["image"])  # type: ignore[union-attr, operator]
    torch.testing.assert_close(batch["mean"], encoded.mode, atol=2e-3, rtol=2e-3)

    train_stage(experiment, "decoder")
    found = read(result_file(experiment, "decoder"))
    assert found.kind == DECODER
    assert found.provenance["handoff"].keys() == {"vae"}
    assert (experiment.folder / "decoder" / "images" / "decoded_0000003.png").is_file()
    header = (experiment.folder / "decoder" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/psnr", "val/psnr_full", "val/ssim"} <= {*header}


@pytest.mark.parametrize("error", [0.5, 0.03, 0.0])
def test_the_loss_in_logarithms_is_the_psnr_but_for_a_factor(error: float) -> None:
    image = 2 * torch.rand(4, 3, 8, 8) - 1
    difference = error * torch.randn_like(image) * torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None, None]
    loss = DistillationLossConfig(l1=0.0, l2=0.0, log_l2=1.0)(difference)
    expected = min(psnr(image, image + difference).mean(), psnr_of(MIN_ERROR))
    torch.testing.assert_close(-10 / math.log(10) * loss + psnr_of(1.0), expected, atol=0.1, rtol=0)


def psnr_of(error: float) -> Tensor:
    return torch.tensor(10 * math.log10(4 / error))


def test_a_loss_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="l1, l2 or log_l2 must be above 0"):
        DistillationLossConfig(l1=0.0, l2=0.0)


@pytest.mark.slow
def test_the_model_file_of_a_run_holds_the_tiny_decoder_also_after_further_training(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, *SECTION)
    assert experiment.stages == ("vae", "clip", "denoiser", "decoder")
    for stage in experiment.stages:
        train_stage(experiment, stage)
    decoder, model = read(result_file(experiment, "decoder")), load(experiment.folder)
    assert model.tiny_decoder is not None
    for name, tensor in decoder.part("tiny_decoder").state.items():
        assert torch.equal(model.tiny_decoder.state_dict()[name], tensor)
    tiny, full = (Pipeline(model)("red apple", seed=1, decoder=each, progress=False)[0] for each in ("tiny", "full"))
    assert json.loads(tiny.info["settings"])["decoder"] == "tiny"
    assert "decoder" not in json.loads(full.info["settings"])
    assert tiny.tobytes() != full.tobytes()

    written = result_file(experiment, "denoiser").stat().st_mtime_ns
    for stage in experiment.stages:  # finished stages are not changed
        train_stage(experiment, stage)
    assert result_file(experiment, "denoiser").stat().st_mtime_ns == written
    train_stage(tiny_experiment(tmp_path, *SECTION, "denoiser.train.max_steps=7"), "denoiser")
    assert load(experiment.folder).tiny_decoder is not None


def _write_results(experiment: Experiment, vae_of_model: str, vae_of_decoder: str) -> None:
    """Write a model and a tiny decoder as the stages of a run do, made from first stages with these fingerprints."""
    save_model(result_file(experiment, "denoiser"), tiny_model(), {"handoff": {"vae": vae_of_model}})
    path, config = result_file(experiment, "decoder"), TinyDecoderConfig((8,), 1, 2)
    path.parent.mkdir()
    save_module(path, DECODER, config.build(), config, provenance={"handoff": {"vae": vae_of_decoder}})


def test_a_tiny_decoder_is_added_to_a_model_of_the_same_first_stage(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, *SECTION)
    experiment.folder.mkdir()
    _write_results(experiment, "a", "a")
    before = load(experiment.folder).state_dict()
    add_tiny_decoder(experiment)
    model = load(experiment.folder)
    assert model.tiny_decoder is not None
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model.provenance == {"handoff": {"vae": "a"}}


def test_a_tiny_decoder_is_not_added_to_a_model_of_another_first_stage(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, *SECTION)
    experiment.folder.mkdir()
    _write_results(experiment, "a", "b")
    with pytest.warns(
        UserWarning, match=r"was trained on another first stage than .*final.safetensors, which is therefore"
    ):
        add_tiny_decoder(experiment)
    assert load(experiment.folder).tiny_decoder is None


def test_a_tiny_decoder_that_does_not_fit_the_first_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"decoder.model: the tiny decoder's factor is 4, but the first stage's is 2; choose"
    ):
        tiny_experiment(tmp_path, *SECTION[1:], "decoder.model={widths: [8], blocks: 1, patch: 4}")


def test_the_cost_of_the_stage_is_counted(tmp_path: Path) -> None:
    for cached in ("true", "false"):
        cost = step_cost(tiny_experiment(tmp_path, *SECTION, f"data.cache_latents={cached}"), "decoder")
        assert cost.flops > 0
