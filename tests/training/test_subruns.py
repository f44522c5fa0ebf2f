from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.data.shards import Sample, write_shard
from ldm.training.experiment import load_config
from ldm.training.probe import Probe
from ldm.training.subruns import SCHEDULE, digest, link_latents
from ldm.training.tasks.task import Step
from tests.data.pictures import encoded, noise_picture
from tests.experiments import PIXELS, tiny_experiment, write_experiment
from tests.tiny import SIZE


def test_runs_after_a_predecessor_was_trained_again_are_others(tmp_path: Path) -> None:
    def found(fingerprint: str, name: str = "vae.safetensors") -> str:
        path = tmp_path / name
        save_file({"weight": torch.zeros(1)}, path, metadata={"fingerprint": fingerprint})
        experiment = tiny_experiment(tmp_path)
        vae = replace(experiment.vae, train=None, checkpoint=str(path))
        return digest(replace(experiment, vae=vae), "denoiser", SCHEDULE)

    assert found("first") == found("first", "moved.safetensors")
    assert found("first") != found("second")


def test_runs_with_a_loss_network_that_was_trained_again_are_others(tmp_path: Path) -> None:
    def found(fingerprint: str) -> str:
        path = tmp_path / "clip.safetensors"
        save_file({"weight": torch.zeros(1)}, path, metadata={"fingerprint": fingerprint})
        term = f"vae.loss.terms=[{{kind: perceptual, checkpoint: {path}, weight: 0.1}}]"
        return digest(tiny_experiment(tmp_path, term), "vae")

    assert found("first") == found("first")
    assert found("first") != found("second")


@pytest.mark.parametrize("split", ["train", "val"])
def test_runs_on_other_images_in_the_same_files_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    experiment = tiny_experiment(tmp_path)
    data = replace(experiment.data, **{split: str(tmp_path / "own.tar")})
    found = []
    for seed in (0, 0, 1):
        monkeypatch.setattr("ldm.training.subruns._FINGERPRINTS", {})  # as in another process
        image = encoded(noise_picture(seed, 4, 4).resize((SIZE, SIZE)))
        write_shard(tmp_path / "own.tar", [Sample("a", "an image", image, "png")])
        found.append(digest(replace(experiment, data=data), "denoiser"))
    assert found[0] == found[1] != found[2]


def test_a_run_has_the_latents_of_its_experiment_and_the_features_of_its_teacher(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path)
    own = replace(experiment, run_dir=str(tmp_path / "own"))
    (experiment.folder / "latents").mkdir(parents=True)
    for name in ("train", "val", "train-teacher"):
        (experiment.folder / "latents" / f"{name}.safetensors").write_text(name)
    link_latents(experiment, own)
    assert {path.stem: path.read_text() for path in (own.folder / "latents").iterdir()} == {
        name: name for name in ("train", "val", "train-teacher")
    }


def test_batches_of_one_step_have_other_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_config(write_experiment(tmp_path, PIXELS), ["denoiser.train.accumulate=2"])
    probe, seeds = Probe(experiment, "denoiser", 2), []
    original = probe.task.losses

    def losses(batch: object, step: Step) -> object:
        seeds.append(step.generator.initial_seed())
        return original(batch, step)

    monkeypatch.setattr(probe.task, "losses", losses)
    for _ in range(2):
        probe.step(1e-4)
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_times_are_those_of_compiled_networks_if_the_config_compiles(tmp_path: Path, compiled: bool) -> None:
    experiment = load_config(write_experiment(tmp_path, PIXELS), [f"trainer.compile={str(compiled).lower()}"])
    probe = Probe(experiment, "denoiser", 1)
    assert {network._compiled_call_impl is not None for network in probe.task.called_modules} == {compiled}
