"""A signal stops a training after its step, with a checkpoint, and the same command resumes it as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import Interrupted, TrainingError
from ldm.formats.ema_snapshots import snapshots
from ldm.training.engine import StageModule
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment
from tests.resume.kills import rows

SETTINGS = [
    "clip.train.max_steps=4",
    "clip.train.validate_every=2",
    "clip.train.images_every=2",
    "clip.train.checkpoint_every=3",
    "clip.train.log_every=3",
    "clip.train.ema_snapshots={lengths: [0.05, 0.1], every: 2}",
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train_stage(tiny_experiment(folder, *SETTINGS), "clip")
    return folder


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StageModule.training_step

    def interrupted_twice(module: StageModule, *arguments: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        original(module, *arguments)

    monkeypatch.setattr(StageModule, "training_step", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        train_stage(tiny_experiment(tmp_path, *SETTINGS), "clip")
    assert not (tmp_path / "run/clip/last.ckpt").exists()


@pytest.mark.parametrize(
    ("hook", "step", "number"),
    [
        ("training_step", 2, signal.SIGTERM),  # validation, images are due
        ("validation_step", 2, signal.SIGUSR1),
        ("training_step", 4, signal.SIGTERM),  # the last step
        ("training_step", 1, signal.SIGINT),
    ],
)
def test_a_signal_saves_at_once_and_what_was_due_is_made_up_for(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str, step: int, number: signal.Signals
) -> None:
    original: Callable[..., None] = getattr(StageModule, hook)

    def signalled(module: StageModule, *arguments: Any) -> None:
        original(module, *arguments)
        if module.completed_steps == step:
            os.kill(os.getpid(), number)

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(StageModule, hook, signalled)
    error = TrainingError if number == signal.SIGINT else Interrupted
    by = "" if number == signal.SIGINT else f"by {number.name} "
    message = f"^stage clip was stopped {by}after step {step} of 4; run the same command to resume it.$"
    with pytest.raises(TrainingError, match=message) as raised:
        train_stage(tiny_experiment(tmp_path, *SETTINGS), "clip")
    assert raised.type is error
    assert torch.load(tmp_path / "run/clip/last.ckpt", weights_only=True)["interrupted"] is True
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    monkeypatch.undo()
    ours, expected = (load_file(train_stage(tiny_experiment(at, *SETTINGS), "clip")) for at in (tmp_path, straight))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert rows(tmp_path / "run/clip/metrics.csv") == rows(straight / "run/clip/metrics.csv")
    averages = [[load_file(path) for path in snapshots(at / "run/clip")] for at in (tmp_path, straight)]
    assert len(averages[0]) == len(averages[1]) == 2
    for mine, theirs in zip(*averages, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    images = [sorted(path.name for path in (at / "run/clip/images").iterdir()) for at in (tmp_path, straight)]
    assert images[0] == images[1]
