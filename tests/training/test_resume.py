"""A resumed training takes over a change of the config from its first step on, or refuses it in one sentence."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.data.shards import Sample, Shards, write_shard
from ldm.data.stream import TrainStream
from ldm.errors import CheckpointError
from ldm.formats.tensors import read_metadata
from ldm.formats.training_checkpoint import resume_points
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.config import TrainConfig
from ldm.training.engine import StageModule
from ldm.training.fit import fit
from ldm.training.stages import build_module, data_of, train_stage
from tests.experiments import tiny_experiment

FIRST, LAST = 2, 5
BEGUN = ["clip.train.max_steps=2", "clip.train.validate_every=100"]
RATE = 2e-3


@dataclass
class Training:
    """What a training did."""

    keys: list[list[str]] = field(default_factory=list)
    saved: list[tuple[str, int]] = field(default_factory=list)
    module: Any = None
    trainer: Any = None
    folder: Path = Path()

    @property
    def group(self) -> dict[str, Any]:
        return self.trainer.optimizers[0].param_groups[0]

    @property
    def average(self) -> torch.Tensor:
        return torch.cat([each.flatten() for each in self.module.ema.average.values()])

    def steps_with(self, column: str) -> list[int]:
        with (self.folder / "run" / "clip" / "metrics.csv").open(newline="") as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row.get(column)]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP trained for two steps."""
    folder = tmp_path_factory.mktemp("begun")
    train_stage(tiny_experiment(folder, *BEGUN), "clip")
    return folder


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Training]:
    """Trains the CLIP of a folder with overrides and tells what was done."""
    start, save = StageModule.on_train_batch_start, Checkpoints.save

    def trained(folder: Path, *overrides: str) -> Training:
        done = Training(folder=folder)

        def started(module: StageModule, batch: Any, index: int) -> None:
            done.keys.append(batch["key"])
            start(module, batch, index)

        def saved(callback: Checkpoints, trainer: Any, module: StageModule, name: str) -> None:
            done.saved.append((name, module.completed_steps))
            save(callback, trainer, module, name)

        monkeypatch.setattr(StageModule, "on_train_batch_start", started)
        monkeypatch.setattr(Checkpoints, "save", saved)
        experiment = tiny_experiment(folder, *BEGUN, f"clip.train.max_steps={LAST}", *overrides)
        done.module = build_module(experiment, "clip")
        done.trainer = fit(done.module, data_of(experiment, done.module), experiment.trainer)
        return done

    return trained


@pytest.fixture
def resume(begun: Path, tmp_path: Path, train: Callable[..., Training]) -> Callable[..., Training]:
    """Resumes a copy of the begun training, elsewhere, with overrides."""

    def resumed(*overrides: str) -> Training:
        shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
        return train(tmp_path, *overrides)

    return resumed


def rate(done: Training) -> float:
    return RATE * done.module.train_config.learning_rate_factor(LAST - 1)


TAKEN_OVER: dict[str, tuple[str, Callable[[Training], bool]]] = {
    "max_steps": ("4", lambda done: done.module.completed_steps == 4),
    "batch_size": ("3", lambda done: [len(keys) for keys in done.keys] == [3, 3, 3]),
    "accumulate": ("2", lambda done: len(done.keys) == 6 and done.module.completed_steps == LAST),
    "learning_rate": ("5e-5", lambda done: done.group["lr"] == 5e-5),
    "betas": ("[0.5, 0.6]", lambda done: done.group["betas"] == (0.5, 0.6)),
    "weight_decay": ("0.5", lambda done: done.group["weight_decay"] == 0.5),
    "warmup_steps": ("100", lambda done: done.group["lr"] == rate(done) < RATE / 10),
    "decay": ("cosine", lambda done: done.group["lr"] == rate(done) < RATE),
    "log_every": ("4", lambda done: done.steps_with("train/loss") == [1, 2, 4, 5]),
    "validate_every": ("3", lambda done: done.steps_with("val/text_to_image_R@1") == [2, 3]),
    "images_every": ("4", lambda done: (done.folder / "run/clip/images/nearest_0000004.png").is_file()),
    "checkpoint_every": ("4", lambda done: [step for name, step in done.saved if name == "last.ckpt"] == [4, 5]),
    "keep_checkpoints": (
        "3",
        lambda done: (
            [path.name for path in resume_points(done.folder / "run/clip")]
            == ["last.ckpt", "step_0000004.ckpt", "step_0000003.ckpt"]
        ),
    ),
    "precision": ("bf16", lambda done: done.trainer.precision == "bf16-mixed"),
    "gradient_checkpointing": (
        "true",
        lambda done: any(getattr(each, "gradient_checkpointing", False) for each in done.module.modules()),
    ),
}
"""Another value of each field, and what it must cause after two steps without it."""

CHANGES_WEIGHTS = {"gradient_clip": "1e-4", "ema_decay": "0.1"}
"""Fields whose other value is seen in the averaged weights."""

REFUSED = {"init": "emoji", "optimizer": "muon", "ema_snapshots": "{every: 2}"}


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(TrainConfig)])
def test_every_field_of_train_is_taken_over_or_refused_when_it_changes(
    resume: Callable[..., Training], tmp_path: Path, name: str
) -> None:
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=rf"clip\.train\.{name} was .* and is now .*give another run_dir"):
            resume(f"clip.train.{name}={REFUSED[name]}")
    elif name in CHANGES_WEIGHTS:
        unchanged = resume().average
        shutil.rmtree(tmp_path / "run")
        assert not torch.equal(resume(f"clip.train.{name}={CHANGES_WEIGHTS[name]}").average, unchanged)
    else:
        value, effect = TAKEN_OVER[name]
        assert effect(resume(f"clip.train.{name}={value}"))


@pytest.mark.parametrize(("batch_size", "accumulate"), [(3, 1), (4, 3), (2, 4), (8, 1)])
def test_a_resumed_training_reads_each_image_of_an_epoch_once_whatever_its_batches(
    tmp_path: Path, train: Callable[..., Training], batch_size: int, accumulate: int
) -> None:
    """Also after a second change; Lightning's count of the batches follows the config's count of the steps."""
    first = train(tmp_path, "clip.train.max_steps=3", "clip.train.batch_size=3", "clip.train.accumulate=2")
    other = [f"clip.train.batch_size={batch_size}", f"clip.train.accumulate={accumulate}"]
    second = train(tmp_path, "clip.train.max_steps=5", *other)
    third = train(tmp_path, "clip.train.max_steps=6", "clip.train.batch_size=5")
    assert [len(each.keys) for each in (first, second, third)] == [6, 2 * accumulate, 1]
    read = [key for each in (first, second, third) for keys in each.keys for key in keys]
    samples = tiny_experiment(tmp_path).data.open("train")
    assert read == [key for batch in TrainStream(samples, 1, 0, len(read)) for key in batch["key"]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed was 0 and is now 1"),
        ("clip.model.text.heads=4", r"clip\.model\.text\.heads was 2 and is now 4"),
        ("clip.tokenizer.context_length=8", r"clip\.tokenizer\.context_length was 12 and is now 8"),
        ("data.shuffle_buffer=4", r"data\.shuffle_buffer was None and is now 4"),
    ],
)
def test_what_a_training_cannot_take_over_is_refused(
    resume: Callable[..., Training], override: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"last\.ckpt cannot be continued with this config: {message}"):
        resume(override)


def test_other_training_images_or_captions_are_refused(
    resume: Callable[..., Training], train: Callable[..., Training], tmp_path: Path
) -> None:
    """Even of the same length in the shard; images in another folder are the same images."""
    resume()
    shard = tmp_path / "train.tar"
    shards = Shards([shard])
    captions = [shards.text(i).replace("red", "tan") for i in range(len(shards))]
    write_shard(
        shard, (Sample(key, captions[i], shards.image(i), "png", {"label": i}) for i, key in enumerate(shards.keys))
    )
    with pytest.raises(CheckpointError, match=r"the images or captions of data\.train are not those"):
        train(tmp_path, "clip.train.max_steps=9")


def test_fewer_steps_than_are_done_are_refused(resume: Callable[..., Training]) -> None:
    with pytest.raises(CheckpointError, match=r"has completed 2 steps, more than clip\.train\.max_steps, which is 1"):
        resume("clip.train.max_steps=1")


def test_a_checkpoint_without_a_record_is_accepted(
    begun: Path, tmp_path: Path, resume: Callable[..., Training]
) -> None:
    """As versions before 0.2 wrote it; it ends in the same weights."""
    expected = resume().average
    shutil.rmtree(tmp_path / "run")
    last = begun / "run" / "clip" / "last.ckpt"
    with_record = last.read_bytes()
    checkpoint = torch.load(last, weights_only=True)
    for name in ("settings", "samples", "samples_per_batch"):
        del checkpoint[name]
    torch.save(checkpoint, last)
    try:
        assert torch.equal(resume().average, expected)
    finally:
        last.write_bytes(with_record)


def test_the_config_in_the_run_folder_says_what_each_stage_was_trained_with(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run" / "config.yaml"

    def written(stage: str) -> dict[str, Any]:
        return yaml.safe_load(config.read_text())[stage]["train"]

    with pytest.raises(CheckpointError):
        train_stage(tiny_experiment(tmp_path, "clip.train.max_steps=9", "seed=1"), "clip")
    assert yaml.safe_load(config.read_text())["seed"] == 0
    with pytest.warns(
        UserWarning, match=r"stage clip is finished, .* clip\.train\.weight_decay was 0\.01 and is now 0\.5"
    ):
        train_stage(tiny_experiment(tmp_path, *BEGUN, "clip.train.weight_decay=0.5"), "clip")
    assert written("clip")["weight_decay"] == 0.01
    train_stage(tiny_experiment(tmp_path, "clip.train.weight_decay=0.3", "vae.train.max_steps=1"), "vae")
    assert (written("clip")["weight_decay"], written("clip")["max_steps"]) == (0.01, 2)
    assert written("vae")["max_steps"] == 1
    train_stage(tiny_experiment(tmp_path, "clip.train.max_steps=3", "clip.train.weight_decay=0.5"), "clip")
    assert written("clip")["weight_decay"] == 0.5
    provenance = json.loads(read_metadata(tmp_path / "run" / "clip" / "final.safetensors")["provenance"])
    assert provenance["steps"] == 3
