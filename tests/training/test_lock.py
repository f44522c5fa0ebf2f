"""One process at a time trains a stage of a run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.errors import TrainingError
from ldm.training.lock import locked
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from ldm.training.lock import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker of a data loader, which outlives the process for a moment
        time.sleep(2)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a folder until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_stage_that_another_process_trains_is_refused_by_name_until_that_is_gone(tmp_path: Path) -> None:
    """Killed, it leaves the names of its files and, for two seconds, a worker that shares its lock."""
    experiment = tiny_experiment(tmp_path, "clip.train.max_steps=1")
    folder = tmp_path / "run" / "clip"
    process = holder(folder)
    try:
        with pytest.raises(
            TrainingError, match=rf"{folder} is being trained by process {process.pid} on .*; wait for it"
        ):
            train_stage(experiment, "clip")
        assert sorted(path.name for path in folder.iterdir()) == [".lock", ".lock.json"]
        train_stage(tiny_experiment(tmp_path, "vae.train.max_steps=1"), "vae")  # another stage
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert train_stage(experiment, "clip").is_file()
    assert not (folder / ".lock.json").exists()


def test_a_lock_is_released_after_an_error_and_can_be_taken_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), locked(tmp_path):
        raise RuntimeError("in the middle")
    with locked(tmp_path), pytest.raises(TrainingError, match=f"process {os.getpid()} on "), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{"])
def test_a_lock_whose_process_is_not_known_is_refused_all_the_same(tmp_path: Path, content: str) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock.json").write_text(content)
        with pytest.raises(TrainingError, match="is being trained by another process; wait for it"), locked(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "vae"
    (folder / ".lock").mkdir(parents=True)
    with pytest.raises(TrainingError, match=rf"the folder {folder} cannot be written to \(Is a directory\)"):
        train_stage(tiny_experiment(tmp_path), "vae")
