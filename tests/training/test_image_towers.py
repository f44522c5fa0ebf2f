"""The frozen image towers of losses: left out of checkpoints, compared by fingerprint when a training is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.cli import dry_run
from ldm.errors import CheckpointError
from ldm.formats.tensors import read_metadata
from ldm.training.experiment import Experiment
from ldm.training.stages import build_module, train_stage
from tests.experiments import tiny_experiment, write_clip
from tests.training.test_recipes import PIXELS

CASES = {
    "vae": ["vae.loss.terms=[{{kind: perceptual, checkpoint: {clip}}}]"],
    "denoiser": [*PIXELS, "denoiser.loss={{kind: repa, hidden_width: 16, checkpoint: {clip}}}"],
}


def experiment_to(step: int, folder: Path, stage: str) -> Experiment:
    overrides = [each.format(clip=folder / "clip.safetensors") for each in CASES[stage]]
    return tiny_experiment(folder, *overrides, f"{stage}.train.max_steps={step}", f"{stage}.train.checkpoint_every=1")


def changed(path: Path) -> None:
    state = load_file(path)
    state["image.projection.weight"] += 1
    save_file(state, path, read_metadata(path))


@pytest.mark.parametrize("stage", CASES)
def test_a_training_resumes_with_the_same_tower_alone(tmp_path: Path, stage: str) -> None:
    write_clip(tmp_path)
    train_stage(experiment_to(1, tmp_path, stage), stage)
    last = tmp_path / "run" / stage / "last.ckpt"
    names = torch.load(last, weights_only=True)["state_dict"].keys()
    module = build_module(experiment_to(2, tmp_path, stage), stage)
    towers = {id(each) for tower in module.task.image_towers.values() for each in tower.parameters()}
    assert {name for name, each in module.task.named_parameters() if id(each) not in towers} <= names
    assert not {name for name, each in module.task.named_parameters() if id(each) in towers} & names

    changed(tmp_path / "clip.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"an image tower of {stage}\.loss.* with fingerprint .* restore the old"
    ):
        train_stage(experiment_to(2, tmp_path, stage), stage)


@pytest.mark.parametrize("stage", CASES)
def test_a_checkpoint_that_holds_its_tower_resumes_like_others(tmp_path: Path, stage: str) -> None:
    """Earlier versions wrote such checkpoints."""
    results = []
    for folder in (tmp_path / "new", tmp_path / "old"):
        folder.mkdir()
        write_clip(folder)
        train_stage(experiment_to(1, folder, stage), stage)
        if folder.name == "old":
            last = folder / "run" / stage / "last.ckpt"
            checkpoint: dict[str, Any] = torch.load(last, weights_only=True)
            task = build_module(experiment_to(2, folder, stage), stage).task
            checkpoint["state_dict"] = {**task.state_dict(), **checkpoint["state_dict"]}
            del checkpoint["image_towers"]
            torch.save(checkpoint, last)
        results.append(load_file(train_stage(experiment_to(2, folder, stage), stage)))
    new, old = results
    assert [name for name in new if not torch.equal(new[name], old[name])] == []

    changed(tmp_path / "old" / "clip.safetensors")
    torch.save(checkpoint, last)
    with pytest.raises(CheckpointError, match=r"with an image tower of .* with fingerprint"):
        train_stage(experiment_to(3, tmp_path / "old", stage), stage)


def test_a_dry_run_counts_checkpoints_without_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path)
    monkeypatch.setattr(dry_run, "GIB", 1)
    experiments = experiment_to(1, tmp_path, "vae"), tiny_experiment(tmp_path)
    with_tower, without = (
        [line for line in dry_run.describe(each, ["vae"]).splitlines() if "disk" in line] for each in experiments
    )
    assert with_tower == without
    assert len(without) == 1
