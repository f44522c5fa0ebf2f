from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.training.experiment import load_config
from ldm.training.probe import Probe
from ldm.training.stages import build_module, data_of, train_stage
from ldm.training.tasks.task import Step
from tests.experiments import PIXELS, tiny_experiment, write_experiment


def pixels(folder: Path, *overrides: str) -> Any:
    return load_config(write_experiment(folder, PIXELS), overrides)


def test_batches_of_one_step_have_other_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, seeds = Probe(pixels(tmp_path, "denoiser.train.accumulate=2"), "denoiser", 2), []
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
    probe = Probe(pixels(tmp_path, f"trainer.compile={str(compiled).lower()}"), "denoiser", 1)
    assert {network._compiled_call_impl is not None for network in probe.task.called_modules} == {compiled}


def test_the_weights_are_those_that_a_training_begins_with(tmp_path: Path) -> None:
    result = load_file(train_stage(pixels(tmp_path, "denoiser.train.max_steps=1"), "denoiser"))
    experiment = pixels(tmp_path, f"denoiser.train.init={tmp_path}/run/model.safetensors", "run_dir=other", "seed=5")
    state = Probe(experiment, "denoiser", 1).task.trainable_module.state_dict()
    assert [name for name in result if not torch.equal(result[name], state[name])] == []


@pytest.mark.parametrize("buffer", ["null", "3"])
def test_the_order_of_the_images_is_that_of_the_training(tmp_path: Path, buffer: str) -> None:
    experiment = pixels(tmp_path, f"data.shuffle_buffer={buffer}", "denoiser.train.batch_size=2")
    expected = [batch["key"] for batch in data_of(experiment, build_module(experiment, "denoiser")).train_dataloader()]
    probe = Probe(experiment, "denoiser", len(expected))
    assert [next(probe.batches)["key"] for _ in expected] == expected


def test_latents_of_both_splits_are_cached_for_the_trainings_to_come(tmp_path: Path) -> None:
    short = [f"{stage}.train.max_steps=1" for stage in ("vae", "clip")]
    experiment = tiny_experiment(tmp_path, *short, "data.cache_latents=true")
    for stage in ("vae", "clip"):
        train_stage(experiment, stage)
    Probe(experiment, "denoiser", 1)
    assert {path.name for path in (experiment.folder / "latents").iterdir()} == {"train.safetensors", "val.safetensors"}
