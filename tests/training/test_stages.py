from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import CheckpointError, LdmError, TrainingError
from ldm.formats import load
from ldm.formats.tensors import read_metadata
from ldm.formats.training_checkpoint import resume_points
from ldm.training.config import TrainConfig
from ldm.training.experiment import load_config
from ldm.training.handoff import result_file
from ldm.training.stages import train_stage
from ldm.training.system_metrics import SYSTEM
from tests.experiments import CAPTIONS, tiny_experiment, write_experiment

TRAIN_KEYS = {field.name for field in dataclasses.fields(TrainConfig)}
STAGES = ["vae", "clip", "denoiser"]
FEW = ["validate_every=100"]


def train(folder: Path, stage: str, *overrides: str) -> Path:
    """A stage of the tiny experiment in ``folder``; overrides are settings of its training, or dotted keys."""
    keys = [f"{stage}.train.{each}" if each.partition("=")[0] in TRAIN_KEYS else each for each in overrides]
    return train_stage(tiny_experiment(folder, *keys), stage)


def assert_same(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


PIXELS = ["vae.model.kind=identity", "denoiser.model.in_channels=3", "denoiser.model.out_channels=3"]


def rows(folder: Path, stage: str) -> list[dict[str, str]]:
    """metrics.csv without the columns of the machine."""
    with (folder / "run" / stage / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.startswith(SYSTEM)} for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all three stages have been trained."""
    folder = tmp_path_factory.mktemp("trained")
    for stage in STAGES:
        train(folder, stage)
    return folder


@pytest.fixture
def copy_of(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of it in which the stages that are named have yet to be trained."""

    def copied(*without: str) -> Path:
        shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
        for stage in without:
            shutil.rmtree(tmp_path / "run" / stage)
        if "denoiser" in without:
            (tmp_path / "run" / "model.safetensors").unlink()
        return tmp_path

    return copied


# A whole run


def test_a_run_ends_in_a_model_that_says_where_it_comes_from(trained: Path) -> None:
    run = trained / "run"
    model = load(run)
    vae, clip = (read_metadata(run / stage / "final.safetensors") for stage in ("vae", "clip"))
    assert model.provenance["handoff"] == {"vae": vae["fingerprint"], "clip": clip["fingerprint"]}
    assert model.provenance["steps"] == 6
    assert model.config.size == (16, 16)
    assert model.tokenizer is not None
    assert model.tokenizer.to_json() == clip["tokenizer"]
    state = model.state_dict()
    for name, tensor in load_file(run / "vae" / "final.safetensors").items():
        assert torch.equal(state[f"first_stage.{name}"], tensor), name
    assert not torch.equal(state["first_stage.latent_std"], torch.ones(4))
    assert state["first_stage.latent_preview"].shape == (3, 5)
    assert load_config(run / "config.yaml") == tiny_experiment(trained)


def test_every_stage_leaves_metrics_and_pictures(trained: Path) -> None:
    for stage, validated in (("vae", "val/psnr"), ("clip", "val/text_to_image_R@1"), ("denoiser", "val/loss")):
        table = rows(trained, stage)
        assert [row["step"] for row in table if row["train/loss"]] == [str(step) for step in range(1, 7)]
        assert [row["step"] for row in table if row[validated]] == ["3", "6"]
        assert list((trained / "run" / stage / "images").glob("*_0000006.png"))
        assert list((trained / "run" / stage / "tensorboard").glob("events.*"))
        assert (trained / "run" / stage / "best.ckpt").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_left_as_it_is(copy_of: Callable[..., Path], stage: str) -> None:
    folder = copy_of()

    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in (folder / "run").rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    assert train(folder, stage).is_file()
    assert state() == before


# Learning


@pytest.mark.parametrize(
    ("stage", "steps", "share", "overrides"),
    [
        ("vae", 50, 0.6, ["vae.loss.adversarial=0"]),
        ("clip", 30, 0.3, []),
        ("denoiser", 60, 0.5, [*PIXELS, "denoiser.conditioner.dropout=0", "denoiser.model.dropout=0"]),
    ],
)  # fmt: skip
def test_a_tiny_model_learns_eight_pictures_by_heart(
    copy_of: Callable[..., Path], stage: str, steps: int, share: float, overrides: list[str]
) -> None:
    folder = copy_of("denoiser") if stage == "denoiser" else copy_of(stage, "denoiser")
    quick = ["validate_every=1000", "checkpoint_every=1000", "log_every=5", f"max_steps={steps}", "batch_size=8"]
    train(folder, stage, *quick, *overrides, "learning_rate=1e-2")
    losses = [float(row["train/loss"]) for row in rows(folder, stage) if row["train/loss"]]
    assert sum(losses[-2:]) / 2 < share * losses[0]


# Going on


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopping_changes_no_bit(copy_of: Callable[..., Path], trained: Path, stage: str, accumulate: int) -> None:
    """Six steps at once equal three, a stop, and three more: weights, averages, and metrics.

    The VAE's discriminator begins at step 2; the denoiser has dropout and trains its text tower along.
    """
    following = STAGES[STAGES.index(stage) :]
    folder = copy_of(*following)
    train(folder, stage, f"accumulate={accumulate}", "max_steps=3")
    assert json.loads(read_metadata(result_file(tiny_experiment(folder), stage))["provenance"])["steps"] == 3
    final = train(folder, stage, f"accumulate={accumulate}")
    if accumulate == 1:
        expected = trained
    else:
        expected = folder / "at_once"
        shutil.copytree(trained, expected)
        for each in following:
            shutil.rmtree(expected / "run" / each)
        (expected / "run" / "model.safetensors").unlink()
        train(expected, stage, "accumulate=2")
    assert_same(final, result_file(tiny_experiment(expected), stage))
    assert rows(folder, stage) == rows(expected, stage)
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (torch.load(at / "run" / stage / name, weights_only=True) for at in (folder, expected))
        assert_equal_trees({key: a[key] for key in ("state_dict", "optimizer_states", "ema", "lr_schedulers")}, b)


def assert_equal_trees(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_checkpoint_is_one_to_go_on_from(copy_of: Callable[..., Path], trained: Path, stage: str) -> None:
    """It holds the weights in training and their average, each in its place."""
    following = STAGES[STAGES.index(stage) :]
    folder = copy_of(*following)
    train(folder, stage, "max_steps=3")
    best, last = (torch.load(folder / "run" / stage / name, weights_only=True) for name in ("best.ckpt", "last.ckpt"))
    assert best["completed_steps"] == 3
    assert_equal_trees(best["state_dict"], last["state_dict"])
    assert_equal_trees(best["ema"], last["ema"])
    shutil.copy(folder / "run" / stage / "best.ckpt", folder / "run" / stage / "last.ckpt")
    assert_same(train(folder, stage), result_file(tiny_experiment(trained), stage))


def test_a_stage_killed_after_its_last_step_only_writes_its_result(copy_of: Callable[..., Path], trained: Path) -> None:
    folder = copy_of("denoiser")
    shutil.copytree(trained / "run" / "denoiser", folder / "run" / "denoiser")
    assert_same(train(folder, "denoiser"), trained / "run" / "model.safetensors")
    assert rows(folder, "denoiser") == rows(trained, "denoiser")


def test_weights_depend_on_the_seed_and_on_nothing_before(copy_of: Callable[..., Path], trained: Path) -> None:
    folder = copy_of("clip", "denoiser")
    torch.randn(5)
    assert_same(train(folder, "clip"), trained / "run" / "clip" / "final.safetensors")
    other = load_file(train(folder, "clip", "seed=1", f"run_dir={folder / 'other'}"))
    assert not torch.equal(
        other["logit_scale"], load_file(trained / "run" / "clip" / "final.safetensors")["logit_scale"]
    )


# What does not fit


def test_a_missing_predecessor_is_named(tmp_path: Path, copy_of: Callable[..., Path]) -> None:
    with pytest.raises(
        TrainingError, match=r"needs the result of stage clip, but .* does not exist; train it first \(--stage clip"
    ):
        train(tmp_path, "denoiser")
    folder = copy_of("vae", "denoiser")
    with pytest.raises(TrainingError, match=r"needs the result of stage vae"):
        train(folder, "denoiser")
    assert not (folder / "run" / "denoiser").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["vae.model.blocks=2"],
            r"vae/final\.safetensors does not fit the config: vae\.model\.blocks is 2 here and 1 there",
        ),
        (["clip.model.text.layers=2"], r"clip/final\.safetensors .*: clip\.model\.text\.layers is 2 here and 1 there"),
    ],
)
def test_a_predecessor_that_does_not_fit_is_told_by_its_field(
    copy_of: Callable[..., Path], overrides: list[str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        train(copy_of("denoiser"), "denoiser", *overrides)


def test_a_predecessor_that_was_trained_anew_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("vae")
    train(folder, "vae", "max_steps=1", *FEW)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was made from predecessors with the fingerprints"):
        train(folder, "denoiser")
    (folder / "run" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt was trained on the vae with fingerprint"):
        train(folder, "denoiser")


def test_a_predecessor_that_was_trained_further_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    train(folder, "vae", "max_steps=7", *FEW)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was made from predecessors with the fingerprints"):
        train(folder, "denoiser")


def test_the_checkpoint_of_another_model_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    (folder / "run" / "vae" / "final.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not fit its config: .* missing \(first_stage\.encoder"):
        train(folder, "vae", "vae.model.blocks=2")


def test_a_checkpoint_that_trains_other_parts_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("denoiser")
    train(folder, "denoiser", "max_steps=2")
    with pytest.raises(
        CheckpointError, match=r"trains \d+ tensors of the networks, but the config has \d+ trainable tensors"
    ):
        train(folder, "denoiser", "denoiser.conditioner.trainable=false")


@pytest.mark.parametrize("stage", ["vae", "denoiser"])
def test_a_resumed_stage_takes_the_learning_rate_of_the_config(copy_of: Callable[..., Path], stage: str) -> None:
    folder = copy_of(*{stage, "denoiser"})
    train(folder, stage, "max_steps=2")
    train(folder, stage, "max_steps=4", "learning_rate=5e-5")
    rates = [float(row["train/learning_rate"]) for row in rows(folder, stage) if row["train/learning_rate"]]
    assert rates == [2e-3, 2e-3, 5e-5, 5e-5]


def test_a_broken_checkpoint_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    (folder / "run" / "vae" / "final.safetensors").unlink()
    last, *older = resume_points(folder / "run" / "vae")
    for path in older:
        path.unlink()
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read \(.*; delete it to restart the stage"):
        train(folder, "vae")


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(copy_of: Callable[..., Path]) -> None:
    import signal

    folder = copy_of("vae")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingError, match=r"loss of stage vae is (nan|inf) at step 0 on .* '\d'.*; there is no"):
        train(folder, "vae", "vae.loss.l2=1e38")
    train(folder, "vae", "max_steps=2")
    with pytest.raises(
        TrainingError,
        match=r"loss of stage vae is (nan|inf) at step 2 on the samples '\d'.*; .* is .*vae/last\.ckpt\. Resume",
    ):
        train(folder, "vae", "vae.loss.l2=1e38")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_label_that_the_data_lacks_is_one_sentence(tmp_path: Path) -> None:
    changes = {"vae": {"model": {"kind": "identity"}}, "clip": None}
    shard = write_experiment(tmp_path, changes).parent / "train.tar"
    from ldm.data.shards import Sample, Shards, write_shard

    shards = Shards([shard])
    samples = [Sample(key, CAPTIONS[i], shards.image(i), "png") for i, key in enumerate(shards.keys)]
    write_shard(shard, samples)
    model = {"in_channels": 3, "out_channels": 3, "context_width": None, "vector_width": 8}
    from ldm.config import from_dict
    from ldm.training.experiment import Experiment
    from tests.experiments import EXPERIMENT

    denoiser = EXPERIMENT["denoiser"] | {
        "model": EXPERIMENT["denoiser"]["model"] | model,
        "conditioner": {"kind": "class", "classes": 3, "width": 8},
    }
    data = EXPERIMENT["data"] | {"train": str(shard), "val": str(shard)}
    config = EXPERIMENT | changes | {"data": data, "denoiser": denoiser, "run_dir": str(tmp_path / "run")}
    with pytest.raises(LdmError, match="class labels, but the data has none"):
        train_stage(from_dict(Experiment, config), "denoiser")


# Starting from weights


def test_init_takes_what_is_trained_and_keeps_the_predecessors(copy_of: Callable[..., Path], trained: Path) -> None:
    """A model made on another first stage lends its network, not its first stage."""
    folder = copy_of("denoiser")
    other = folder / "other.safetensors"
    tensors, metadata = (
        load_file(trained / "run" / "model.safetensors"),
        read_metadata(trained / "run" / "model.safetensors"),
    )
    moved = {name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(moved, other, metadata)
    tiny = ["learning_rate=1e-30", "max_steps=1", "denoiser.train.weight_decay=0", "ema_decay=0"]
    state = load_file(train(folder, "denoiser", f"init={other}", *tiny))
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[name] if name.startswith("first_stage.") else moved[name]), name


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("clip/final.safetensors", "holds no first_stage, but text_encoder and image_encoder; name another source"),
        ("none.safetensors", "there is no model"),
    ],
)
def test_an_init_that_does_not_fit_is_refused(copy_of: Callable[..., Path], source: str, message: str) -> None:
    folder = copy_of("vae")
    with pytest.raises(CheckpointError, match=message):
        train(folder, "vae", f"init={folder / 'run' / source}")
    assert not (folder / "run" / "vae" / "last.ckpt").exists()


# Numbers


def test_under_autocast_the_weights_stay_in_fp32(copy_of: Callable[..., Path], trained: Path) -> None:
    folder = copy_of("denoiser")
    state = load_file(train(folder, "denoiser", "max_steps=1", "trainer.precision=bf16", *FEW))
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    losses = [float(rows(at, "denoiser")[0]["train/loss"]) for at in (folder, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_cached_latents_train_the_same_network(copy_of: Callable[..., Path], trained: Path) -> None:
    """The cache keeps 11 bits of the posteriors."""
    folder = copy_of("denoiser")
    train(folder, "denoiser", "data.cache_latents=true")
    cached, encoded = (
        [float(row["train/loss"]) for row in rows(at, "denoiser") if row["train/loss"]] for at in (folder, trained)
    )
    assert cached == pytest.approx(encoded, rel=5e-3)
    assert all(math.isfinite(loss) for loss in cached)


def test_the_discriminator_begins_at_its_step(copy_of: Callable[..., Path]) -> None:
    """disc_start is 2: after two steps its weights are still those that it began with, after three they are not."""
    folder = copy_of("vae")
    states = []
    for steps in (1, 2, 3):
        train(folder, "vae", f"max_steps={steps}", *FEW)
        checkpoint = torch.load(folder / "run" / "vae" / "last.ckpt", weights_only=True)
        states.append(
            {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("discriminator.")}
        )
    assert_equal_trees(states[0], states[1])
    changed = [
        name for name in states[2] if name.endswith("weight") and not torch.equal(states[2][name], states[1][name])
    ]
    assert len(changed) == len([name for name in states[2] if name.endswith("weight")])
    table = rows(folder, "vae")
    assert [bool(row["train/discriminator"]) for row in table if row["train/loss"]] == [False, False, True]
