"""Trainings with the loss `repa`: what it trains, writes, costs and refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ldm.benchmarks.peaks import count_operations
from ldm.data.stream import TrainStream
from ldm.errors import CheckpointError, ConfigError
from ldm.training.costs import outline, step_cost
from ldm.training.engine import StageModule
from ldm.training.stages import build_module, data_of, train_stage
from tests.experiments import tiny_experiment, write_clip
from tests.training.test_recipes import PIXELS, trained

FIELDS = "kind: repa, hidden_width: 16"


def state_of(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "run/denoiser/last.ckpt", weights_only=True)["state_dict"]
    return state


def test_it_trains_denoiser_and_projection_is_counted_and_resumes_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = [f"denoiser.loss={{{FIELDS}, checkpoint: {write_clip(tmp_path)}}}"]
    operations, plain = [], StageModule.training_step

    def counted(module: StageModule, batch: Mapping[str, Any], index: int) -> None:
        operations.append(count_operations(lambda: plain(module, batch, index)).total)

    with monkeypatch.context() as context:
        context.setattr(StageModule, "training_step", counted)
        trained(tmp_path / "counted", recipe, 1)
    recipe = ["denoiser.train.checkpoint_every=1", *recipe]
    at_once, resumed = trained(tmp_path / "at_once", recipe, 2), trained(tmp_path / "resumed", recipe, 1, 2)
    state = state_of(tmp_path / "at_once")
    assert [name for name in at_once if not torch.equal(resumed[name], at_once[name])] == []
    again = state_of(tmp_path / "resumed")
    assert [name for name in state if not torch.equal(again[name], state[name])] == []

    experiment = tiny_experiment(tmp_path, *PIXELS, *recipe)
    begun = build_module(experiment, "denoiser").task.state_dict()
    changed = {name for name in state if not torch.equal(begun[name], state[name])}
    assert {f"loss.projection.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")} <= changed
    assert {name.split(".")[1] for name in begun.keys() - state.keys()} == {"encoder"}
    assert not any(name.startswith("loss") for name in at_once)
    without = step_cost(tiny_experiment(tmp_path, *PIXELS), "denoiser")

    cost = step_cost(experiment, "denoiser")
    assert cost.flops == operations[-1] > without.flops
    added = {name: tensor.nbytes for name, tensor in begun.items() if name.startswith("loss.")}
    projection = sum(size for name, size in added.items() if name.startswith("loss.projection."))
    assert cost.weights == without.weights + sum(added.values())
    assert cost.trained == without.trained + projection
    assert "loss repa, with its teacher" in outline(experiment, "denoiser").networks


@pytest.mark.slow
def test_it_trains_in_a_compiled_denoiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the weights without compiling, in as many graphs for any number of steps; the time of inductor is left out."""
    recipe = ["denoiser.train.validate_every=1", f"denoiser.loss={{{FIELDS}, checkpoint: {write_clip(tmp_path)}}}"]
    expected = trained(tmp_path / "plain", recipe, 2)
    compile_module, graphs = torch.nn.Module.compile, []
    for steps in (1, 2):
        torch._dynamo.reset()
        counter = CompileCounter()
        with monkeypatch.context() as context:
            context.setattr(torch.nn.Module, "compile", lambda module, by=counter: compile_module(module, backend=by))
            found = trained(tmp_path / f"compiled {steps}", [*recipe, "trainer.compile=true"], steps)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)


def test_it_uses_the_clip_of_the_experiment_and_caches_its_features(tmp_path: Path) -> None:
    """The features of a batch are those of its images, in half precision."""
    short = [f"{stage}.train.max_steps=2" for stage in ("vae", "clip", "denoiser")]
    short += [f"denoiser.loss={{{FIELDS}, strength: 5}}"]
    experiment, without_cache = (
        tiny_experiment(tmp_path, *short, f"data.cache_latents={cached}") for cached in ("true", "false")
    )
    for stage in ("vae", "clip", "denoiser"):
        train_stage(experiment, stage)
    module = build_module(experiment, "denoiser")
    samples, images = data_of(experiment, module).samples("train"), experiment.data.open("train")
    batch, live = (next(iter(TrainStream(each, 8, 0, 1))) for each in (samples, images))
    assert "image" not in batch
    torch.testing.assert_close(batch["teacher"], module.task.teacher.encode(live["image"]), rtol=1e-3, atol=1e-3)
    clip = load_file(tmp_path / "run/clip/final.safetensors")
    tower = build_module(experiment, "denoiser").task.image_towers["denoiser.loss"].state_dict()
    assert all(torch.equal(clip[f"image.{name}"], each) for name, each in tower.items())

    features = load_file(tmp_path / "run/latents/train-teacher.safetensors")["teacher"]
    assert (len(features), features.dtype) == (8, torch.float16)
    assert not (tmp_path / "run/latents/val-teacher.safetensors").exists()
    positions, weights = 4 * 4 * 4, 3 * 16 * 16  # of 4 images, and of the three layers of the projection
    weighted = tiny_experiment(tmp_path, *short, "data.cache_latents=true", "denoiser.loss=weighted")
    flops = step_cost(experiment, "denoiser").flops
    assert flops - step_cost(weighted, "denoiser").flops == 6 * positions * weights  # forward and backward
    assert flops < step_cost(without_cache, "denoiser").flops


def test_a_network_of_timm_is_the_teacher(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", pretrained=False)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    recipe = [f"denoiser.loss={{{FIELDS}, checkpoint: 'timm:test_vit={tmp_path / 'vit.safetensors'}', layer: 3}}"]
    trained(tmp_path / "timm", recipe, 1)
    state = state_of(tmp_path / "timm")
    assert state["loss.projection.4.weight"].shape == (64, 16)
    assert not any("encoder" in name for name in state)
    wrong = tiny_experiment(tmp_path, *PIXELS, f"denoiser.loss={{{FIELDS}, checkpoint: 'timm:test_vitt'}}")
    with pytest.raises(CheckpointError, match=r"^denoiser\.loss: timm has no network 'test_vitt'"):
        outline(wrong, "denoiser")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*PIXELS, "denoiser.loss=repa"],
            "repa needs a teacher, but the experiment has no image tower; name the source",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_the_config_is_read(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"denoiser.loss: {message}"):
        tiny_experiment(tmp_path, *overrides)


def test_features_that_are_no_maps_and_sources_without_a_tower_are_refused(tmp_path: Path) -> None:
    loss = f"{FIELDS}, checkpoint: {write_clip(tmp_path)}"
    linear = "noise_embedding.mlp.0"
    for fields, message in [
        (f"{loss}, feature: {linear}", f"denoiser.loss: feature is '{linear}', whose output is no feature map"),
        (f"{loss}, feature: middle.9", "unknown feature 'middle.9'"),
        (f"{loss}, layer: 2", "denoiser.loss: layer of repa is 2, but the teacher has 1 blocks"),
    ]:
        experiment = tiny_experiment(tmp_path, *PIXELS, f"denoiser.loss={{{fields}}}")
        with pytest.raises(ConfigError, match=message):
            outline(experiment, "denoiser")
    missing = tiny_experiment(tmp_path, *PIXELS, f"denoiser.loss={{{FIELDS}, checkpoint: {tmp_path / 'none'}}}")
    with pytest.raises(CheckpointError, match=r"^denoiser\.loss: "):
        outline(missing, "denoiser")
