"""Trainings on two processes, compared with one at the same global batch."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.data.shards import Sample, write_shard
from ldm.formats.sharded_checkpoint import is_sharded, load_sharded
from ldm.formats.tensors import read_tensors
from ldm.training.system_metrics import SYSTEM
from tests.data.pictures import encoded, noise_picture
from tests.experiments import write_clip, write_experiment
from tests.training.rank_training import record, train
from tests.training.test_losses import DENOISER, PIXELS

STAGES = ("vae", "clip", "denoiser")
STEPS = 20
FIELDS = (f"max_steps={STEPS}", "validate_every=10", "checkpoint_every=20", "learning_rate=1e-4")
COMMON = [
    "denoiser.model.dropout=0",  # its masks depend on the shape of a batch
    *(f"{stage}.train.{field}" for stage in STAGES for field in FIELDS),
    "vae.train.accumulate=2",
]


def size(count: int) -> list[str]:
    return [f"{stage}.train.batch_size={count}" for stage in STAGES]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(tmp_path: Path, strategy: str) -> None:
    """Losses, metrics and validations of all stages to 1e-5, and the same samples."""
    config, val = write_experiment(tmp_path), tmp_path / "val.tar"
    # Seven validation images: one rank is left without a sample in the last batch.
    images = (encoded(noise_picture(i, 16, 16)) for i in range(7))
    write_shard(val, (Sample(f"{i}", "red apple", image, "png", {}) for i, image in enumerate(images)))
    common = [*COMMON, f"data.val={val}"]
    one = train(config, STAGES, [*common, *size(6), f"run_dir={tmp_path / 'one'}"])
    overrides = [*common, *size(3), f"run_dir={tmp_path / 'two'}", f"trainer.strategy={strategy}"]
    two = train(config, STAGES, overrides, 2)
    for stage in STAGES:
        expected, *found = record(one, stage), record(two, stage, 0), record(two, stage, 1)
        assert [a + b for a, b in zip(*(each["keys"] for each in found), strict=True)] == expected["keys"]
        rows = found[0]["rows"]
        assert len(rows) == len(expected["rows"]) == STEPS + 2
        for row, wanted in zip(rows, expected["rows"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-5, abs=1e-7), (stage, row["step"])


FLOW = ["denoiser.diffusion={schedule: flow, parametrization: flow}"]
SAMPLED = (
    "base_resolution: 8, offset_noise: 0.1, noise_level_sampler: {kind: low_discrepancy, distribution: logit_normal}"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        f"{{kind: contrastive_flow, {SAMPLED}}}",
        "{kind: dispersive, input_perturbation: 0.1, temperature: 0.1}",
        "{kind: repa, checkpoint: CLIP, hidden_width: 16}",
    ],
)
def test_losses_are_those_of_the_batch_of_all_ranks(tmp_path: Path, loss: str) -> None:
    config, stage = write_experiment(tmp_path), "denoiser"
    fields = ("max_steps=4", "validate_every=4", "learning_rate=1e-4")
    loss = loss.replace("CLIP", str(write_clip(tmp_path)))
    common = [*DENOISER, *FLOW, f"denoiser.loss={loss}", "denoiser.model.dropout=0"]
    common += [f"{stage}.train.{field}" for field in fields]
    one, two = (
        train(config, [stage], [*common, f"run_dir={tmp_path / str(n)}", f"denoiser.train.batch_size={6 // n}"], n)
        for n in (1, 2)
    )
    for row, wanted in zip(record(two, stage)["rows"], record(one, stage)["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6), row["step"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_self_condition_the_same_batches(tmp_path: Path, strategy: str) -> None:
    config, stage = write_experiment(tmp_path), "denoiser"
    common = [*DENOISER, "denoiser.model.dropout=0", "denoiser.model.self_conditioning=0.5"]
    common += [f"{stage}.train.{field}" for field in ("max_steps=6", "validate_every=6", "learning_rate=1e-3")]
    sizes = {1: ["denoiser.train.batch_size=6"], 2: ["denoiser.train.batch_size=3", f"trainer.strategy={strategy}"]}
    one, two = (train(config, [stage], [*common, f"run_dir={tmp_path / str(n)}", *sizes[n]], n) for n in (1, 2))
    for row, wanted in zip(record(two, stage)["rows"], record(one, stage)["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6), row["step"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "conditioner", ["{kind: text, pooled: false, trainable: true}", "{kind: image, tokens: true, trainable: true}"]
)
def test_encoders_of_conditions_are_trained_on_two_ranks(tmp_path: Path, conditioner: str, strategy: str) -> None:
    """Encoders of whose outputs the denoiser reads one."""
    config, stage = write_experiment(tmp_path), "denoiser"
    common = [
        *PIXELS,
        f"denoiser.conditioner={conditioner}",
        "denoiser.model.dropout=0",
        "denoiser.model.vector_width=null",
    ]
    common += [f"{stage}.train.{field}" for field in ("max_steps=3", "validate_every=3", "learning_rate=1e-3")]
    train(config, ["clip"], ["clip.train.max_steps=1", f"run_dir={tmp_path / 'clip'}"])
    common += ["clip.train=null", f"clip.checkpoint={tmp_path / 'clip' / 'clip' / 'final.safetensors'}"]
    sizes = {1: ["denoiser.train.batch_size=6"], 2: ["denoiser.train.batch_size=3", f"trainer.strategy={strategy}"]}
    one, two = (train(config, [stage], [*common, f"run_dir={tmp_path / str(n)}", *sizes[n]], n) for n in (1, 2))
    for row, wanted in zip(record(two, stage)["rows"], record(one, stage)["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6), row["step"]


@pytest.mark.slow
def test_ranks_that_draw_their_own_numbers_evaluate_their_networks_equally_often(tmp_path: Path) -> None:
    """With ``fsdp2``, whose ranks gather weights in each evaluation, the training would hang otherwise."""
    config, stage = write_experiment(tmp_path), "denoiser"
    fields = [f"{stage}.train.{field}" for field in ("max_steps=6", "validate_every=6", "batch_size=3")]
    settings = [*DENOISER, *fields, "denoiser.model.self_conditioning=0.5", "trainer.shared_draws=false"]
    folder = train(config, [stage], [*settings, f"run_dir={tmp_path / 'run'}", "trainer.strategy=fsdp2"], 2)
    assert [row["step"] for row in logged(folder / stage)][-1] == 6


@pytest.mark.slow
def test_averages_do_not_depend_on_the_ranks_that_computed_them(tmp_path: Path) -> None:
    """Each row covers steps of two ranks and of one, before and after a resume."""
    fields = ("log_every=5", "max_steps=10", "validate_every=100", "accumulate=2", "learning_rate=1e-4")
    stage = "denoiser"
    common = [*DENOISER, "denoiser.model.dropout=0", *(f"{stage}.train.{field}" for field in fields)]
    config = write_experiment(tmp_path)

    def run(name: str, ranks: int, strategy: str, killed_after: int | None = None) -> Path:
        settings = [
            f"run_dir={tmp_path / name}",
            f"trainer.strategy={strategy}",
            f"{stage}.train.batch_size={8 // ranks}",
        ]
        return train(config, [stage], [*common, *settings], ranks, killed_after)

    for session in ((2, "fsdp2", 3), (1, "auto", 7), (2, "ddp")):
        folder = run("many", *session)
    expected, found = (logged(each / stage) for each in (run("one", 1, "auto"), folder))
    assert [row["step"] for row in found] == [5, 10, 10]
    assert {"train/loss", "train/gradient_norm", "train/gradient_norm_max", "train/loss_sigma_0.32_1"} <= found[
        0
    ].keys()
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.csv`` without the columns of the machine."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value and not name.startswith(SYSTEM)}
            for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_sharded_training_is_killed_and_resumed_by_one_rank_and_by_two(tmp_path: Path) -> None:
    """It ends with the weights of ddp to 1e-5, by way of checkpoints of two ranks, of one and of two again."""
    config = write_experiment(tmp_path)
    common = [*COMMON, "vae.train.checkpoint_every=1", "vae.train.validate_every=4", "vae.loss.disc_start=1"]
    ddp = train(config, ["vae"], [*common, *size(4), "vae.train.max_steps=8", f"run_dir={tmp_path / 'ddp'}"], 2)
    common += [f"run_dir={tmp_path / 'run'}", "trainer.strategy=fsdp2"]
    steps = "vae.train.max_steps=8"
    folder = train(config, ["vae"], [*common, *size(4), steps], 2, killed_after=3) / "vae"
    last = folder / "last.ckpt"
    assert is_sharded(last)
    assert load_sharded(last)["completed_steps"] == 3
    train(config, ["vae"], [*common, *size(8), steps, "trainer.strategy=auto"], killed_after=5)
    assert last.is_file()
    train(config, ["vae"], [*common, *size(4), steps], 2)
    assert is_sharded(last)
    expected, found = (load_file(each / "final.safetensors") for each in (ddp / "vae", folder))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    checkpoint = read_tensors(last)  # as Pipeline.from_pretrained(run, checkpoint="last") does
    assert all(torch.equal(checkpoint[name], found[name]) for name in found if not name.startswith("latent_"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_strategies_train_with_gradient_checkpointing_and_compiled(tmp_path: Path, strategy: str) -> None:
    """To the losses of one rank without them, in bf16 too."""
    config = write_experiment(tmp_path)
    common = [*COMMON, "clip.train.max_steps=3", "clip.train.validate_every=3", "clip.train.accumulate=2"]
    one = train(config, ["clip"], [*common, *size(4), f"run_dir={tmp_path / 'one'}"])
    both = ["clip.train.gradient_checkpointing=true", "trainer.compile=true", f"trainer.strategy={strategy}"]
    two = train(config, ["clip"], [*common, *both, *size(2), f"run_dir={tmp_path / 'two'}"], 2)
    for row, wanted in zip(record(two, "clip")["rows"], record(one, "clip")["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
