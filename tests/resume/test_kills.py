"""A training that was killed leaves what one leaves that was not: see kills.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")

MOMENTS = [
    "6+0",  # before the second checkpoint, in the first epoch
    "8+0.02",  # in the same interval
    "best.part*1",  # in a validation
    "last.part*1",
    "17+0",  # in a later epoch
    "23+0.03",  # in the last step, its validation, or after them
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "clip", "denoiser"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_was_killed_equals_one_that_was_not(stage: str, workers: int) -> None:
    # with workers fewer, since the lock of a killed training is free when its workers have ended
    assert_equal_after_kills(stage, workers, "local", MOMENTS if workers == 0 else MOMENTS[1::2])


@pytest.mark.slow
def test_a_training_from_a_bucket_that_was_killed_equals_one_that_was_not() -> None:
    assert_equal_after_kills("clip", 2, "s3", ["shard.part*2", "9+0.02", "17+0"])


def assert_equal_after_kills(stage: str, workers: int, source: str, moments: list[str]) -> None:
    options = ["--stage", stage, "--workers", str(workers), "--source", source, "--at", *moments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{stage}, {workers} workers, {source}: all equal"
