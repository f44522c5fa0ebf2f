"""Trainings on aspect buckets and mixtures that are killed equal those that are not: see kills.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.resume.kills import SCHEDULE, Training, kill_and_compare
from tests.training.test_buckets import write_images

ROOT = Path(__file__).parents[2]
MOMENTS = ["7+0", "best.part*1", "17+0.02"]


def differences(folder: Path, order: str) -> list[str]:
    """What differs between a training in buckets, of a mixture, or both, and one of the same config that was killed."""
    train, val, *buckets = write_images(folder)
    other = write_images(folder, 10, "other.tar")[0].partition("=")[2]
    first = train.partition("=")[2]
    mixture = [f"data.mixture=[{{source: {first}, weight: 2}}, {{source: {other}}}]", "data.train=null"]
    overrides = [*(f"vae.train.{name}={value}" for name, value in SCHEDULE.items()), val]
    overrides += [*(mixture if order != "buckets" else [train]), *(buckets if order != "mixture" else [])]
    straight, killed = (Training(folder / name, "vae", overrides) for name in ("straight", "killed"))
    for training in (straight, killed):
        training.folder.mkdir()
    assert straight.run() == 0, straight.log
    return kill_and_compare(straight, killed, iter(MOMENTS))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["buckets", "mixture", "both"])
def test_a_killed_training_reads_on_in_each_bucket_and_source(tmp_path: Path, order: str) -> None:
    command = [sys.executable, "-m", "tests.resume.test_buckets", str(tmp_path), order]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)  # a process with more threads cannot be forked
    sys.exit("\n".join(differences(Path(sys.argv[1]), sys.argv[2])[:20]) or 0)
