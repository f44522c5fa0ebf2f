"""Trainings on aspect buckets and mixtures that are killed equal those that are not: see kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resume.kills import SCHEDULE, Training, kill_and_compare
from tests.training.test_buckets import write_images

MOMENTS = ["7+0", "best.part*1", "17+0.02"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["buckets", "mixture", "both"])
def test_a_killed_training_reads_on_in_each_bucket_and_source(tmp_path: Path, order: str) -> None:
    train, val, *buckets = write_images(tmp_path)
    other = write_images(tmp_path, 10, "other.tar")[0].partition("=")[2]
    first = train.partition("=")[2]
    mixture = [f"data.mixture=[{{source: {first}, weight: 2}}, {{source: {other}}}]", "data.train=null"]
    overrides = [*(f"vae.train.{name}={value}" for name, value in SCHEDULE.items()), val]
    overrides += [*(mixture if order != "buckets" else [train]), *(buckets if order != "mixture" else [])]
    straight, killed = (Training(tmp_path / name, "vae", overrides) for name in ("straight", "killed"))
    for training in (straight, killed):
        training.folder.mkdir()
    assert straight.run() == 0, straight.log
    assert kill_and_compare(straight, killed, iter(MOMENTS)) == []
