from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.data.shards import Sample, write_shard
from ldm.training.subruns import SCHEDULE, digest, link_latents
from tests.data.pictures import encoded, noise_picture
from tests.experiments import tiny_experiment
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
    link_latents(experiment.folder, own.folder)
    assert {path.stem: path.read_text() for path in (own.folder / "latents").iterdir()} == {
        name: name for name in ("train", "val", "train-teacher")
    }
