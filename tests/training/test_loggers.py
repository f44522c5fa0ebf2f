from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.errors import ConfigError, TrainingError
from ldm.training.config import TrainerConfig
from ldm.training.environment import SESSIONS
from ldm.training.loggers import LoggedRun
from ldm.training.loggers.tensorboard import TensorBoardConfig
from ldm.training.loggers.weights_and_biases import WandbConfig
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment

RUN = {"stage": "clip", "settings": {"seed": 0}}


@pytest.fixture(autouse=True)
def _settings_of_wandb_are_read_again() -> Iterator[None]:
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def test_a_training_that_is_resumed_records_its_metrics_and_sessions(tmp_path: Path) -> None:
    for stop in (3, 6):
        overrides = ["vae.train.log_every=4", "vae.train.validate_every=6", f"vae.train.max_steps={stop}"]
        train_stage(tiny_experiment(tmp_path, *overrides), "vae")
    with (tmp_path / "run" / "vae" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["step"] for row in rows] == ["3", "4", "6"]
    for row in rows:
        assert float(row["train/gradient_norm_max"]) >= float(row["train/gradient_norm"]) > 0
        assert float(row["train/discriminator_gradient_norm"]) > 0
        assert 0 <= float(row["system/data_wait"]) <= 1
        assert float(row["system/memory_gib"]) > 0.05
        assert float(row["system/samples_per_second"]) > 0
    events = EventAccumulator(str(tmp_path / "run" / "vae" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/gradient_norm_max")] == [3, 4, 6]
    sessions = [json.loads(line) for line in (tmp_path / "run" / "vae" / SESSIONS).read_text().splitlines()]
    assert [(each["event"], each["step"]) for each in sessions] == [("start", 0), ("end", 3), ("start", 3), ("end", 6)]
    assert sessions[0]["environment"]["torch"]
    assert sessions[0]["run"]["precision"] == "fp32"


def test_weights_and_biases_continues_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step, values in ((0, [1.0, 0.5]), (1, [0.5, 0.25])):
        logger = WandbConfig(project="ldm-test").open(LoggedRun(folder=tmp_path, step=step, **RUN))
        for i, value in enumerate(values):
            logger.write(step + 1 + i, {"train/loss": value})
        logger.close()
    identity = (tmp_path / "wandb.id").read_text()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert {run.name.rpartition("-")[2] for run in runs} == {identity}
    content = b"".join(path.read_bytes() for run in runs for path in run.glob("*.wandb"))
    assert b"train/loss" in content
    assert b"ldm-test" in content


def test_weights_and_biases_without_a_login_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(TrainingError, match="Weights & Biases cannot be used"):
        WandbConfig(project="ldm-test").open(LoggedRun(folder=tmp_path, step=0, **RUN))


def test_a_logger_whose_package_is_missing_is_named_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'ldm\[wandb\]'"):
        WandbConfig(project="ldm-test").check()


def test_two_loggers_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer: loggers contains the kind tensorboard more than once"):
        tiny_experiment(tmp_path, "trainer.loggers=[tensorboard, tensorboard]")


def test_loggers_are_chosen_by_the_config(tmp_path: Path) -> None:
    trainer = tiny_experiment(tmp_path, "trainer.loggers=[tensorboard, {kind: wandb, project: mine}]").trainer
    assert trainer.loggers == (TensorBoardConfig(), WandbConfig(project="mine"))
    assert TrainerConfig().loggers == (TensorBoardConfig(),)
