from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.cli import train as command
from tests.commands import exit_code
from tests.experiments import tiny_experiment, write_experiment

ROOT = Path(__file__).parents[2]
LONG = ["vae.train.max_steps=40", "vae.train.checkpoint_every=4", "vae.train.validate_every=20"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command, run in this process."""
    return exit_code(monkeypatch, command.main, "train.py", *arguments)


def interrupted(
    arguments: list[str], due: Callable[[], bool], number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """tools/train.py in a process of its own, sent a signal once it is due."""
    process = subprocess.Popen(
        [sys.executable, "tools/train.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not due() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def completed(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["completed_steps"] if checkpoint.is_file() else 0


@pytest.mark.slow
def test_stopped_and_killed_it_goes_on_and_ends_as_if_nothing_had_been(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Ctrl-C, then kill -9, then to the end, by the same command: the weights of a run at once, bit for bit."""
    config = write_experiment(tmp_path)
    arguments = ["--stage", "vae", "--config", str(config), *LONG]
    stage = tmp_path / "run" / "vae"
    last = stage / "last.ckpt"

    stopped = interrupted(arguments, last.is_file, signal.SIGINT)
    after_stop = completed(last)
    assert stopped.returncode == 2
    assert stopped.stderr.splitlines()[-1] == (
        f"error: stage vae was stopped after step {after_stop} of 40; run the same command to resume it."
    )
    assert "Traceback" not in stopped.stderr
    assert 4 <= after_stop < 40

    written = last.stat().st_mtime_ns
    killed = interrupted(arguments, lambda: last.stat().st_mtime_ns > written, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    after_kill = completed(last)
    assert after_stop < after_kill < 40
    assert not (stage / "final.safetensors").exists()

    assert run(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out == f"stage vae is finished: {stage / 'final.safetensors'}\n"
    at_once = [*arguments, f"run_dir={tmp_path / 'at_once'}"]
    assert run(monkeypatch, *at_once) == 0
    ours, expected = (load_file(at / "vae" / "final.safetensors") for at in (tmp_path / "run", tmp_path / "at_once"))
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    with (stage / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == [
            str(step) for step in range(1, 41)
        ]


@pytest.mark.slow
def test_two_processes_train_the_clip_of_one_with_the_batches_of_both(tmp_path: Path) -> None:
    """To rounding, which Adam amplifies; the files are written once, and gradients are accumulated on each process."""
    config, states = write_experiment(tmp_path), []
    both = ["clip.train.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp"]
    for name, overrides in (("one", ["clip.train.batch_size=4"]), ("two", both)):
        settings = [*overrides, "clip.train.accumulate=2", "clip.train.max_steps=3", f"run_dir={tmp_path / name}"]
        command = [sys.executable, "tools/train.py", "--stage", "clip", "--config", str(config), *settings]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (
            done.stdout.splitlines()[-1] == f"stage clip is finished: {tmp_path / name / 'clip' / 'final.safetensors'}"
        )
        assert done.stdout.count("is finished") == 1
        states.append(load_file(tmp_path / name / "clip" / "final.safetensors"))
        with (tmp_path / name / "clip" / "metrics.csv").open(newline="") as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "3"]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-3)


def test_a_finished_stage_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--stage", "clip", "--config", write_experiment(tmp_path), "clip.train.max_steps=1"]
    for _ in range(2):
        assert run(monkeypatch, *arguments) == 0
        described = capsys.readouterr()
        assert described.out == f"stage clip is finished: {tmp_path / 'run' / 'clip' / 'final.safetensors'}\n"
    assert "step/s" not in described.err  # the second time, nothing is trained


def test_a_dry_run_tells_all_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_experiment(tmp_path)
    arguments = ["--dry-run", "--stage", "all", "--config", config, "denoiser.train.accumulate=3"]
    assert run(monkeypatch, *arguments) == 0
    described = capsys.readouterr().out
    model = tiny_experiment(tmp_path).denoiser.model.build()
    assert f"  denoiser: {sum(p.numel() for p in model.parameters()):,} parameters" in described
    assert "  batch: 4 x 3 accumulated = 12 per device" in described
    assert "  learning rate: 0.002 after 0 steps, then constant" in described
    assert "the stages fit each other: latents 4 x 8 x 8" in described
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "vea"], "unknown stage 'vea'; did you mean 'vae'?"),
        (["--stage", "vae", "vae.train.max_stesp=3"], "unknown key 'max_stesp'; did you mean 'max_steps'?"),
        (["--stage", "vae", "max_steps"], "the override 'max_steps' is not of the form key=value"),
        (["--stage", "vae", "vae.train=null"], "does not train stage vae; choose one of clip, denoiser."),
        (["--stage", "denoiser"], "stage denoiser needs the result of stage clip"),
        (["--stage", "vae", "data.train=/nowhere"], "/nowhere does not exist"),
        (["--stage", "vae", "--config", "none.yaml"], "the config none.yaml does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    given = arguments if "--config" in arguments else ["--config", write_experiment(tmp_path), *arguments]
    assert run(monkeypatch, *given) == 2
    described = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(described) == 1
    assert message in described[0]
    assert not (tmp_path / "run" / "denoiser").exists()


def test_the_door_opens_from_anywhere(tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "train.py", "--stage", "vea", "--config", config],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown stage 'vea'")
