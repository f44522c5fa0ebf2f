"""Trainings on two processes, compared with one at the same global batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ldm.data.shards import Sample, write_shard
from tests.data.pictures import encoded, noise_picture
from tests.experiments import write_experiment
from tests.training.rank_training import record, train

STAGES = ("vae", "clip", "denoiser")
STEPS = 20
COMMON = [
    "denoiser.model.dropout=0",  # its masks depend on the shape of a batch
    *(
        f"{stage}.train.{field}"
        for stage in STAGES
        for field in (f"max_steps={STEPS}", "validate_every=10", "checkpoint_every=20")
    ),
    "vae.train.accumulate=2",
]


def size(count: int) -> list[str]:
    return [f"{stage}.train.batch_size={count}" for stage in STAGES]


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Losses, metrics and validations of all stages within 1e-5, the same samples, and files that agree."""
    config = write_experiment(tmp_path)
    val = tmp_path / "val.tar"  # seven: one rank is left without a sample in the last batch
    write_shard(val, (Sample(f"v{i}", "red apple", encoded(noise_picture(i, 16, 16)), "png", {}) for i in range(7)))
    common = [*COMMON, f"data.val={val}"]
    one = train(config, STAGES, [*common, *size(6), f"run_dir={tmp_path / 'one'}"])
    two = train(config, STAGES, [*common, *size(3), f"run_dir={tmp_path / 'two'}"], 2)
    for stage in STAGES:
        expected, found, other = record(one, stage), record(two, stage), record(two, stage, 1)
        assert [a + b for a, b in zip(found["keys"], other["keys"], strict=True)] == expected["keys"]
        assert found["rows"] == other["rows"]
        assert len(found["rows"]) == len(expected["rows"]) == STEPS + 2
        for row, wanted in zip(found["rows"], expected["rows"], strict=True):
            assert row.keys() == wanted.keys()
            for name, value in wanted.items():
                assert math.isclose(row[name], value, rel_tol=1e-5, abs_tol=1e-5), (
                    stage,
                    row["step"],
                    name,
                    row[name],
                    value,
                )
