"""Trainings on sets with bad samples, and on data that disappears: what is listed, resumed and reported."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.data.bad_samples import BAD, BadSample, Reason, read_counts
from ldm.data.samples import Samples
from ldm.data.shards import Sample, write_shard
from ldm.data.stream import TrainStream
from ldm.errors import LdmError
from ldm.training.bad_samples import BadSamples
from ldm.training.engine import StageModule
from ldm.training.stages import train_stage
from ldm.training.tasks.vae import VAETask
from tests.data.pictures import encoded, noise_picture
from tests.experiments import SIZE, tiny_experiment
from tests.processes import run_on_ranks

SAMPLES = 24
BROKEN = {3: b"", 11: b"no image", 17: encoded(noise_picture(0, SIZE, SIZE))[:-30]}


def write_set(folder: Path, broken: dict[int, bytes]) -> None:
    samples = [
        Sample(f"{i:02d}", f"image {i}", broken.get(i, encoded(noise_picture(i, SIZE, SIZE))), "png")
        for i in range(SAMPLES)
    ]
    write_shard(folder / "train.tar", samples)


def train(folder: Path, *overrides: str) -> Path:
    quick = ["loss.adversarial=0", "train.validate_every=100", "train.checkpoint_every=2"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the sample .* cannot be used")
        return train_stage(tiny_experiment(folder, *(f"vae.{each}" for each in quick), *overrides), "vae")


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the samples that trainings use."""
    used: list[str] = []
    start = StageModule.on_train_batch_start

    def started(module: StageModule, batch: Any, index: int) -> None:
        used.extend(batch["key"])
        start(module, batch, index)

    monkeypatch.setattr(StageModule, "on_train_batch_start", started)
    return used


@pytest.fixture
def at_batch(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], object]]:
    """What is called, once, when a training begins a batch."""
    actions: dict[int, Callable[[], object]] = {}
    start = StageModule.on_train_batch_start

    def started(module: StageModule, batch: Any, index: int) -> None:
        actions.pop(index, int)()
        start(module, batch, index)

    monkeypatch.setattr(StageModule, "on_train_batch_start", started)
    return actions


def crash() -> None:
    raise RuntimeError("crash")


@pytest.mark.slow
def test_a_resumed_training_uses_and_lists_what_one_that_was_not_stopped_does(
    tmp_path: Path, at_batch: dict[int, Callable[[], object]], keys: list[str]
) -> None:
    settings = ["data.max_bad_fraction=0.5", "vae.train.max_steps=8", "vae.train.validate_every=4"]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
        write_set(tmp_path / name, BROKEN)
    train(tmp_path / "straight", *settings)
    straight, keys[:] = list(keys), []
    at_batch |= {3: crash, 7: crash}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="crash"):
            train(tmp_path / "stopped", *settings)
    train(tmp_path / "stopped", *settings)
    assert keys[-8:] == straight[-8:]
    assert not {f"{i:02d}" for i in BROKEN} & {*keys}
    files = [tmp_path / name / "run" / "vae" / "bad_samples.csv" for name in ("straight", "stopped")]
    texts = [path.read_text().replace(str(path.parents[2]), "") for path in files]
    assert texts[0] == texts[1]
    reasons = {"empty image": 1, "unknown image format": 1, "broken image": 1}
    assert read_counts(files[0]) == {"train": reasons, "val": reasons}
    states = [torch.load(path.with_name("last.ckpt"), weights_only=True)["bad_samples"] for path in files]
    assert [state["seen"] for state in states] == [32, 32]
    for row in states[1]["found"]:
        assert row["split"] == "val" or row["step"] == row["position"] // 4 + 1


def test_too_many_bad_samples_stop_the_training_and_raising_the_limit_resumes_it(
    tmp_path: Path, keys: list[str]
) -> None:
    write_set(tmp_path, BROKEN)
    with pytest.raises(
        LdmError,
        match=r"^2 of the \d+ training samples that stage vae has read by step \d+ cannot be used \(.* image.*\), more than "
        r"data\.max_bad_fraction \(0\.01\) allows; they are listed in .*bad_samples\.csv: repair or remove them",
    ) as error:
        train(tmp_path)
    assert "\n" not in str(error.value)
    before = len(keys)
    assert before < 4 * 6
    assert train(tmp_path, "data.max_bad_fraction=0.2").is_file()
    assert len(keys) - before <= 4 * 6


def count_on_two_ranks(folder: str) -> None:
    """Read different bad samples on each rank; the second one exceeds the limit."""
    rank = torch.distributed.get_rank()
    trainer: Any = SimpleNamespace(world_size=2, is_global_zero=rank == 0)
    trainer.datamodule = SimpleNamespace(
        validates=False, data=SimpleNamespace(max_bad_fraction=0.001), samples=lambda split: Samples1000()
    )
    config = SimpleNamespace(log_every=2)
    module: Any = SimpleNamespace(stage="vae", folder=Path(folder), train_config=config, completed_steps=0)
    module.is_optimizer_step = lambda batch: True
    callback, errors, checkpoint = BadSamples(), [], {}
    callback.on_train_start(trainer, module)
    for step in range(4):
        module.completed_steps = step + 1
        bad = [BadSample(Reason.BROKEN_IMAGE, f"{step}", "a.tar", "is broken", step, 2 * step + rank)]
        batch = {"key": ["a"], BAD: bad if step % 2 == rank and step < 3 else []}
        try:
            callback.on_train_batch_end(trainer, module, None, batch, step)
        except LdmError as error:
            errors.append((step, str(error)))
            break
    callback.on_save_checkpoint(trainer, module, checkpoint)
    rows = [(row["step"], row["position"], row["key"]) for row in checkpoint["bad_samples"]["found"]]
    assert rows == [(1, 0, "0"), (2, 3, "1")]
    assert checkpoint["bad_samples"]["seen"] == 4
    assert [(step, message.split(",")[0]) for step, message in errors] == [
        (1, "2 of the 4 training samples that stage vae has read by step 2 cannot be used (2 broken image)")
    ]
    if rank == 0:
        assert read_counts(Path(folder) / "bad_samples.csv") == {"train": {"broken image": 2}}


class Samples1000(Samples):
    lengths = (1000,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the sample .* cannot be used")
def test_all_ranks_count_the_bad_samples_of_all(tmp_path: Path) -> None:
    run_on_ranks(functools.partial(count_on_two_ranks, str(tmp_path)), tmp_path)


def test_the_first_bad_sample_is_a_warning_and_alone_no_error(tmp_path: Path) -> None:
    write_set(tmp_path, {3: b""})
    with pytest.warns(
        UserWarning, match=r"^the sample '03' in .*train\.tar of data\.train cannot be used and is replaced"
    ):
        train_stage(tiny_experiment(tmp_path, "vae.loss.adversarial=0", "vae.train.validate_every=100"), "vae")


def test_a_loss_that_is_not_finite_names_the_samples_of_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    write_set(tmp_path, {})
    losses = VAETask.losses

    def infinite(task: VAETask, batch: Any, step: Any) -> Any:
        for loss in losses(task, batch, step):
            yield loss._replace(value=loss.value * (float("nan") if len(keys) == 8 else 1.0))

    monkeypatch.setattr(VAETask, "losses", infinite)
    with pytest.raises(LdmError, match=r"the loss of stage vae is nan at step 1 on the samples ") as error:
        train(tmp_path)
    assert f" {', '.join(map(repr, keys[-4:]))};" in str(error.value)


def test_a_shard_that_disappears_stops_the_training_in_a_sentence_and_is_resumed(
    tmp_path: Path, at_batch: dict[int, Callable[[], object]], keys: list[str]
) -> None:
    write_set(tmp_path, {})
    shard = tmp_path / "train.tar"
    at_batch[3] = lambda: shard.rename(tmp_path / "away")
    with pytest.raises(LdmError, match=rf"^cannot read the shard {re.escape(str(shard))}: No such file"):
        train(tmp_path)
    (tmp_path / "away").rename(shard)
    train(tmp_path)
    assert len(keys) == 4 * 6


@pytest.mark.slow
def test_a_worker_that_is_killed_stops_the_training_in_a_sentence_and_is_resumed(
    tmp_path: Path, at_batch: dict[int, Callable[[], object]], keys: list[str]
) -> None:
    write_set(tmp_path, {})
    settings = ["data.workers=2", "vae.train.max_steps=30", "vae.train.checkpoint_every=5"]
    at_batch[6] = lambda: os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    with pytest.raises(
        LdmError, match=r"^the process \d+ of data\.workers .*; run the same command to resume"
    ) as error:
        train(tmp_path, *settings)
    assert "\n" not in str(error.value)
    stopped = len(keys)
    assert stopped < 4 * 30
    train(tmp_path, *settings)
    experiment = tiny_experiment(tmp_path, *settings)
    stream = TrainStream(experiment.data.open("train"), 4, experiment.seed, 30)
    assert keys[stopped:] == [key for batch in stream for key in batch["key"]][-len(keys[stopped:]) :]
