"""There is always a good checkpoint: damage and full disks cost the newest one at most."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import CheckpointError
from ldm.formats.sharded_checkpoint import replace_checkpoint
from ldm.formats.training_checkpoint import find_checkpoint, resume_points
from ldm.training.callbacks import checkpoints
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment, write_experiment
from tests.resume.kills import rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP after four steps, with the checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("trained")
    train_stage(tiny_experiment(folder, "clip.train.max_steps=4"), "clip")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that training without its result; the images stay where they were."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run/clip/final.safetensors").unlink()
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    """In the values of a weight, which torch reads without noticing."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["clip.text.position_embedding"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 4
    path.write_bytes(content)
    torch.load(path, weights_only=True, mmap=True)


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trained: Path, run: Path, damage: object) -> None:
    last, older = resume_points(run / "run/clip")
    assert (last.name, older.name) == ("last.ckpt", "step_0000003.ckpt")
    damage(last)  # type: ignore[operator]
    with pytest.warns(UserWarning, match=rf"{last} .*; the training resumes from {older}"):
        ours = load_file(train_stage(tiny_experiment(run, "clip.train.max_steps=4"), "clip"))
    expected = load_file(trained / "run/clip/final.safetensors")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert rows(run / "run/clip/metrics.csv") == rows(trained / "run/clip/metrics.csv")
    assert resume_points(run / "run/clip") == [last, older]


def test_if_all_are_damaged_nothing_is_overwritten(run: Path) -> None:
    for path in resume_points(run / "run/clip"):
        cut(path)
    with pytest.raises(CheckpointError, match=r"are damaged \(last\.ckpt, step_0000003\.ckpt\); restore one"):
        train_stage(tiny_experiment(run, "clip.train.max_steps=4"), "clip")


def test_a_run_goes_on_elsewhere_when_its_first_place_is_gone(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("elsewhere") / "place"
    shutil.copytree(run, other)
    shutil.rmtree(run)
    train_stage(tiny_experiment(other, "clip.train.max_steps=5"), "clip")
    assert [row["step"] for row in rows(other / "run/clip/metrics.csv") if row["train/loss"]] == list("12345")


def test_last_ckpt_is_there_while_it_is_replaced(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = []

    def replace(path: Path, other: Path) -> None:
        there.append(other.is_file())
        replace_checkpoint(path, other)

    monkeypatch.setattr(checkpoints, "replace_checkpoint", replace)
    train_stage(tiny_experiment(run, "clip.train.max_steps=6"), "clip")
    assert there == [True, True]
    last, older = resume_points(run / "run/clip")
    assert (last.name, older.name) == ("last.ckpt", "step_0000005.ckpt")


def test_if_last_ckpt_is_gone_the_one_before_is_found(run: Path) -> None:
    (run / "run/clip/last.ckpt").unlink()
    assert find_checkpoint(run / "run/clip", "last").name == "step_0000003.ckpt"


def command(folder: Path, run_dir: Path, steps: int, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """tools/train.py for a number of steps, with a limit on the size of each file that it writes."""
    settings = [f"run_dir={run_dir}", f"clip.train.max_steps={steps}", "clip.train.keep_checkpoints=1"]
    return subprocess.run(
        [sys.executable, "tools/train.py", "--stage", "clip", "--config", write_experiment(folder), *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: limit and resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("limited", ["disk", "file"])
def test_without_space_the_checkpoints_stay_and_with_space_it_goes_on(
    trained: Path, tmp_path: Path, limited: str
) -> None:
    run = tmp_path / "run"
    limit: int | None = 200_000  # two thirds of a checkpoint
    run.mkdir()
    if limited == "disk":
        limit = None
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", run], check=False).returncode:
            pytest.skip("mounting a tmpfs is not permitted")
    try:
        done = command(tmp_path, run, 1)
        assert done.returncode == 0, done.stderr
        last = run / "clip/last.ckpt"
        before = last.read_bytes()
        stopped = command(tmp_path, run, 4, limit)
        reason = "No space left on device" if limited == "disk" else "File too large"
        assert stopped.returncode == 2, stopped.stderr
        assert stopped.stderr.splitlines()[-1] == (
            f"error: the checkpoint of step 2 cannot be written to {run / 'clip'} ({reason}); free some space there and run the "
            f"same command to resume from {last}."
        )
        assert "Traceback" not in stopped.stderr
        assert last.read_bytes() == before
        assert not list(run.glob("*/*.part"))
        if limited == "disk":
            subprocess.run(["mount", "-o", "remount,size=4m", run], check=True)
        done = command(tmp_path, run, 4)
        assert done.returncode == 0, done.stderr
        ours, expected = (load_file(at / "clip/final.safetensors") for at in (run, trained / "run"))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    finally:
        if limited == "disk":
            subprocess.run(["umount", "--lazy", run], check=True)  # the tensors are memory-mapped
