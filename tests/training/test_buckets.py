"""Stages that train on aspect buckets: the shapes and sizes that they see, resuming, and several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.cli.dry_run import describe
from ldm.conditioning.sdxl import SDXLConditioner
from ldm.data.bucket_order import order_of
from ldm.data.buckets import BucketConfig
from ldm.data.shards import Sample, write_shard
from ldm.data.stream import EvaluationLoader, TrainStream
from ldm.errors import CheckpointError, ConfigError
from ldm.model import LatentDiffusion
from ldm.training.engine import StageModule
from ldm.training.experiment import Experiment
from ldm.training.stages import train_stage
from ldm.training.tasks import DenoiserTask
from ldm.training.tasks.task import Step
from tests.data.pictures import encoded, noise_picture
from tests.experiments import CAPTIONS, tiny_experiment
from tests.training.rank_training import record, train
from tests.training.test_ranks import COMMON, STEPS

SHAPES = BucketConfig(4).table(16, 16)
ASPECTS = [(16, 16), (20, 12), (12, 20), (30, 18), (40, 15), (11, 20), (17, 16)]  # width, height
BUCKETS = ["data.buckets={step: 4}", "data.sizes=true"]


def write_images(folder: Path, count: int = 21, name: str = "aspects.tar") -> list[str]:
    """Write a set of images of several aspect ratios, and return the overrides that train on it in buckets."""
    path = folder / name
    images = (encoded(noise_picture(i, *ASPECTS[i % len(ASPECTS)][::-1])) for i in range(count))
    write_shard(path, (Sample(f"{i:02d}", CAPTIONS[i % 8], image, "png", {}) for i, image in enumerate(images)))
    return [f"data.train={path}", f"data.val={path}", *BUCKETS]


def test_the_tiny_table() -> None:
    assert SHAPES == [(20, 12), (16, 16), (12, 20)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int], list[str]]]:
    """Stage, shape and keys of the batches of this process, training and validation."""
    batches: list[tuple[str, tuple[int, int], list[str]]] = []
    training, validation = StageModule.training_step, StageModule.validation_step

    def add(module: StageModule, batch: Mapping[str, Any]) -> None:
        batches.append((module.stage, tuple(batch["image"].shape[-2:]), batch["key"]))

    def trained(module: StageModule, batch: Mapping[str, Any], index: int) -> None:
        add(module, batch)
        training(module, batch, index)

    def validated(module: StageModule, batch: Mapping[str, Any], index: int) -> None:
        add(module, batch)
        validation(module, batch, index)

    monkeypatch.setattr(StageModule, "training_step", trained)
    monkeypatch.setattr(StageModule, "validation_step", validated)
    return batches


@pytest.mark.slow
def test_each_stage_trains_and_validates_on_its_shapes(
    tmp_path: Path, seen: list[tuple[str, tuple[int, int], list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The CLIP, whose image tower takes one size, on data.size."""
    schedule = ("max_steps=6", "validate_every=6", "images_every=6", "checkpoint_every=6")
    train = [f"{stage}.train.{each}" for stage in ("vae", "clip", "denoiser") for each in schedule]
    experiment = tiny_experiment(tmp_path, *write_images(tmp_path), *train)
    printed = {}
    for stage in ("vae", "clip", "denoiser"):
        train_stage(experiment, stage)
        printed[stage] = capsys.readouterr().out.splitlines()
        batches = [(shape, keys) for name, shape, keys in seen if name == stage]
        assert {shape for shape, _ in batches} == ({(16, 16)} if stage == "clip" else set(SHAPES))
        validation = [key for _, keys in batches[6:] for key in keys]
        assert sorted(validation) == [f"{i:02d}" for i in range(21)]
    assert printed["clip"] == []
    assert printed["vae"] == printed["denoiser"]
    assert [line.split() for line in printed["vae"]] == [
        ["height", "x", "width", "images", "batches", "an", "epoch"],
        ["20", "x", "12", "6", "1.5"],
        ["16", "x", "16", "6", "1.5"],
        ["12", "x", "20", "9", "2.2"],
    ]
    described = describe(experiment, ["vae"])
    assert all(line in described for line in printed["vae"])


def test_the_conditioner_of_sdxl_receives_the_sizes_of_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = "{vocab_size: 300, context_length: 12, width: 16, layers: 1, heads: 2}"
    overrides = [
        *write_images(tmp_path),
        f"denoiser.conditioner={{kind: sdxl, trainable: true, size_embedding_width: 8, second: {second}}}",
        "denoiser.model.context_width=32",
        "denoiser.model.vector_width=64",
        "vae.model=identity",
        "vae.train=null",
        "vae.loss={adversarial: 0}",
        "denoiser.model.in_channels=3",
        "denoiser.model.out_channels=3",
    ]
    experiment = tiny_experiment(tmp_path, *overrides)
    assert experiment.clip is not None
    model = LatentDiffusion(experiment.model_config, experiment.clip.tokenizer.build(CAPTIONS))
    task = DenoiserTask(experiment.denoiser, model)
    given: list[Mapping[str, Any]] = []
    sizes = SDXLConditioner._sizes

    def spied(conditioner: SDXLConditioner, inputs: Mapping[str, Any]) -> torch.Tensor:
        given.append(inputs)
        return sizes(conditioner, inputs)

    monkeypatch.setattr(SDXLConditioner, "_sizes", spied)
    for batch in TrainStream(experiment.data.open("train"), 3, 0, 9):
        list(task.losses(batch, Step(0, 0, torch.Generator())))
        shape = tuple(batch["image"].shape[-2:])
        assert given[-1]["target_size"] == [shape] * 3
        for row, key in enumerate(batch["key"]):
            assert given[-1]["original_size"][row] == ASPECTS[int(key) % len(ASPECTS)][::-1]
    assert {each["target_size"][0] for each in given} == set(SHAPES)


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_each_bucket_with_another_batch_size(
    tmp_path: Path, seen: list[tuple[str, tuple[int, int], list[str]]]
) -> None:
    common = [*write_images(tmp_path), "data.val=null", "vae.train.images_every=100"]
    sessions = [(2, 4, 1), (4, 3, 2)]
    history, position = [], 0
    for steps, size, accumulate in sessions:
        settings = {"max_steps": steps, "batch_size": size, "accumulate": accumulate}
        experiment = tiny_experiment(tmp_path, *common, *(f"vae.train.{key}={each}" for key, each in settings.items()))
        train_stage(experiment, "vae")
        history.append((position, size))
        position = sum(len(keys) for _, _, keys in seen)
    position = 0
    samples = experiment.data.open("train")
    for _, shape, keys in seen:
        known = [each for each in history if each[0] <= position]
        draw = order_of(samples, 0, None, known).draw(position, len(keys))
        assert (draw.shape, [f"{i:02d}" for i in draw.index]) == (shape, keys)
        position += len(keys)
    other = [each.replace("{step: 4}", "{step: 4, max_aspect: 3}") for each in common]
    experiment = tiny_experiment(tmp_path, *other, "vae.train.max_steps=9")
    with pytest.raises(CheckpointError, match=r"data\.buckets\.max_aspect was 2\.0 and is now 3\.0"):
        train_stage(experiment, "vae")


def test_a_step_that_the_networks_would_round_is_refused(tmp_path: Path) -> None:
    def experiment(step: int, size: int = 16) -> Experiment:
        return tiny_experiment(tmp_path, f"data.buckets={{step: {step}}}", f"data.size={size}")

    experiment(4)
    message = (
        r"the sides of data\.buckets must be multiples of 4, the downsampling of first stage \(2\) and denoiser \(2\);"
    )
    with pytest.raises(ConfigError, match=message):
        experiment(2)


@pytest.mark.slow
def test_two_ranks_train_in_buckets_as_one(tmp_path: Path) -> None:
    """Losses, metrics and validations to 1e-5, the same samples, and one shape in each batch of both."""
    from tests.experiments import write_experiment

    config, images = write_experiment(tmp_path), write_images(tmp_path)
    sizes = {count: [f"{stage}.train.batch_size={count}" for stage in ("vae", "clip", "denoiser")] for count in (6, 3)}
    stages = ("vae", "clip", "denoiser")
    one = train(config, stages, [*COMMON, *images, *sizes[6], f"run_dir={tmp_path / 'one'}"])
    two = train(config, stages, [*COMMON, *images, *sizes[3], f"run_dir={tmp_path / 'two'}"], 2)
    buckets = tiny_experiment(tmp_path, *images).data.open("train").buckets()
    assert buckets is not None
    for stage in ("vae", "denoiser"):
        expected, *found = record(one, stage), record(two, stage, 0), record(two, stage, 1)
        batches = [a + b for a, b in zip(*(each["keys"] for each in found), strict=True)]
        assert batches == expected["keys"]
        assert all(len({int(buckets.of[int(key)]) for key in batch}) == 1 for batch in batches)
        rows = found[0]["rows"]
        assert len(rows) == len(expected["rows"]) == STEPS + 2
        for row, wanted in zip(rows, expected["rows"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-5, abs=1e-7), (stage, row["step"])


def test_previews_and_pipelines_keep_the_size_of_the_model(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, *write_images(tmp_path))
    assert experiment.model_config.size == (16, 16)
    batch = next(iter(EvaluationLoader(experiment.data.open("val"), 8)))
    assert batch["image"].shape == (8, 3, 16, 16)
