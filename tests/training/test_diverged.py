"""A training whose weights, gradients or losses are not finite ends in one sentence, and leaves what can be gone on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import CheckpointError, TrainingError
from ldm.training.ema import not_finite
from ldm.training.engine import StageModule
from ldm.training.handoff import result_file
from ldm.training.stages import train_stage
from ldm.vae.metrics import measure_latents
from tests.experiments import tiny_experiment
from tests.tiny import tiny_model

STAGES = ["vae", "clip", "denoiser"]
QUICK = ["validate_every=2", "max_steps=4", "checkpoint_every=2"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which each stage has been trained for two steps, the first two to their ends."""
    folder = tmp_path_factory.mktemp("begun")
    for stage in STAGES:
        settings = [f"{stage}.train.{each}" for each in (*QUICK, "max_steps=2")]
        train_stage(tiny_experiment(folder, *settings), stage)
    (folder / "run" / "model.safetensors").unlink()
    return folder


@pytest.fixture
def train(begun: Path, tmp_path: Path) -> Callable[..., Path]:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)

    def trained(stage: str, *overrides: str) -> Path:
        settings = [f"{stage}.train.{each}" for each in (*QUICK, *overrides)]
        return train_stage(tiny_experiment(tmp_path, *settings), stage)

    return trained


@pytest.mark.parametrize(("stage", "rate"), [("clip", "1e19"), ("clip", "1e38"), ("vae", "1e39"), ("denoiser", "1e19")])
def test_weights_that_diverge_never_replace_a_checkpoint_and_never_become_a_result(
    train: Callable[..., Path], tmp_path: Path, stage: str, rate: str
) -> None:
    """Whether the weights are infinite or only too large to compute with; resuming as the message says ends well."""
    last, result = tmp_path / "run" / stage / "last.ckpt", result_file(tiny_experiment(tmp_path), stage)
    before, finished = last.read_bytes(), result.read_bytes() if result.is_file() else None
    with pytest.raises(
        TrainingError, match=rf"; the last good checkpoint is {last}\. Resume it with a lower .*best\.ckpt"
    ):
        train(stage, f"learning_rate={rate}", "ema_decay=0")
    assert last.read_bytes() == before
    assert (result.read_bytes() if result.is_file() else None) == finished
    assert not_finite(load_file(train(stage, "learning_rate=1e-6"))) is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_that_diverges_in_its_last_step_has_no_result(
    train: Callable[..., Path], tmp_path: Path, stage: str
) -> None:
    result = result_file(tiny_experiment(tmp_path), stage)
    result.unlink(missing_ok=True)
    with pytest.raises(TrainingError, match=rf"stage {stage} .* after step 3; the last good checkpoint"):
        train(stage, "max_steps=3", "learning_rate=1e38", "ema_decay=0")
    assert not result.exists()


def test_gradients_that_are_not_finite_are_named_as_the_cause(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = StageModule.on_before_optimizer_step

    def spoil(module: StageModule, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        before(module, optimizer)

    monkeypatch.setattr(StageModule, "on_before_optimizer_step", spoil)
    with pytest.raises(
        TrainingError, match=r"the gradient norm of stage clip is nan after step 3; the last good checkpoint"
    ):
        train("clip")


@pytest.mark.parametrize("part", ["state_dict", "ema"])
def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(
    train: Callable[..., Path], tmp_path: Path, part: str
) -> None:
    """As earlier versions may have left it."""
    last = tmp_path / "run" / "clip" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    weights = checkpoint[part] if part == "state_dict" else checkpoint[part]["average"]
    name = next(name for name, tensor in weights.items() if tensor.ndim == 2)
    weights[name][0, 0] = float("inf")
    torch.save(checkpoint, last)
    with pytest.raises(CheckpointError, match=rf"{last}: the weight {name} holds NaN .*; copy .*best\.ckpt to it"):
        train("clip")


def test_latents_that_are_not_finite_cannot_be_measured() -> None:
    first_stage = tiny_model().first_stage
    with torch.no_grad():
        next(first_stage.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"encodes the training images to latents that are not finite"):
        measure_latents(first_stage, [{"image": torch.zeros(2, 3, 16, 16)}])
