"""A training goes on with another number of processes, with the same sequence of samples; all of them stop together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldm.data.stream import TrainStream
from tests.experiments import tiny_experiment, write_experiment
from tests.resume.logged import read_keys

ROOT = Path(__file__).parents[2]


def start(folder: Path, ranks: int, *settings: str, script: str = "tests/resume/logged.py") -> subprocess.Popen[str]:
    config = str(write_experiment(folder))
    before = (
        ["--stage", "clip", "--config", config] if script.startswith("tools") else [folder / "keys", "clip", config]
    )
    several = [
        f"trainer.devices={ranks}",
        f"trainer.strategy={'ddp' if ranks > 1 else 'auto'}",
        "clip.train.validate_every=100",
    ]
    command = [sys.executable, ROOT / script, *before, *several, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def read_in_order(folder: Path, ranks: int) -> list[str]:
    """The keys that the ranks have read, batch by batch and in the order of the ranks; the logs are deleted."""
    paths = [folder / "keys", *(folder / f"keys.{rank}" for rank in range(1, ranks))]
    batches = zip(*(read_keys(path) for path in paths), strict=True)
    keys = [key for batch in batches for _, line in batch for key in line.split()]
    for path in paths:
        path.unlink()
    return keys


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sessions"),
    [
        [(1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1)],  # ranks, batch size, accumulate: the same global batch
        [(2, 3, 1), (1, 2, 1), (2, 2, 2)],  # another one each time
    ],
)
def test_each_session_reads_on_where_the_last_one_ended(tmp_path: Path, sessions: list[tuple[int, int, int]]) -> None:
    read: list[str] = []
    for number, (ranks, batch_size, accumulate) in enumerate(sessions, 1):
        train = {"max_steps": 2 * number, "batch_size": batch_size, "accumulate": accumulate}
        process = start(tmp_path, ranks, *(f"clip.train.{name}={value}" for name, value in train.items()))
        _, err = process.communicate()
        assert process.returncode == 0, err
        read += read_in_order(tmp_path, ranks)
    assert len(read) == sum(2 * ranks * batch_size * accumulate for ranks, batch_size, accumulate in sessions)
    samples = tiny_experiment(tmp_path).data.open("train")
    assert read == [key for batch in TrainStream(samples, 1, 0, len(read)) for key in batch["key"]]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["one rank", "the process group"])
def test_all_ranks_stop_at_the_same_step_with_a_code_for_the_queue(tmp_path: Path, to: str) -> None:
    """Also the processes that read data, which are in the process group."""
    settings = ["clip.train.max_steps=2000", "data.workers=1"]
    process = start(tmp_path, 2, *settings, script="tools/train.py")
    last = tmp_path / "run/clip/last.ckpt"
    while not last.is_file() and process.poll() is None:
        time.sleep(0.01)
    if to == "one rank":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        other = next(
            int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes() and is_rank(pid)
        )
        os.kill(other, signal.SIGUSR1)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    step = torch.load(last, weights_only=True)["completed_steps"]
    by = "a signal to another process" if to == "one rank" else "SIGTERM"
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        f"error: stage clip was stopped by {by} after step {step} of 2000; run the same command to resume it."
    ]
    assert "Traceback" not in err


def is_rank(pid: str) -> bool:
    """Whether a process is a rank, not one that reads data."""
    return b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
