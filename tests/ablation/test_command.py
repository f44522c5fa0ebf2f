from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ldm.ablation import metrics, runner
from ldm.ablation.runs import Record, Run
from ldm.ablation.step_times import StepTimes
from ldm.ablation.work import work
from ldm.cli import ablate as command
from ldm.evaluation.receipt import read_receipts
from ldm.evaluation.subject import Options
from ldm.formats import save
from ldm.report.run import Run as RunFolder
from ldm.training.engine import StageModule
from ldm.training.stages import train_stage
from tests.ablation.experiments import RECIPES, arguments_of, write_recipes
from tests.commands import exit_code
from tests.experiments import tiny_experiment, write_clip, write_experiment
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command, run in this process."""
    return exit_code(monkeypatch, command.main, "ablate.py", *arguments)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count of the training steps. Runs are trained in this process; a step takes 1 s, twice that with twice the batch."""

    def run_all(runs: list[Run], *others: Any) -> None:
        finished: Callable[[Run, int], None] = others[-1]
        for each in runs:
            each.prepare()
            work(each.folder)
            finished(each, 0)

    def step_times(experiments: Any, stage: str, *_: Any) -> StepTimes:
        sizes = {name: getattr(each, stage).train.batch_size / 4 for name, each in experiments.items()}
        return StepTimes("a device", 1, 1.0, {name: (size,) for name, size in sizes.items()})

    count = [0]
    original = StageModule.training_step

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        count[0] += 1

    monkeypatch.setattr(runner, "run_all", run_all)
    monkeypatch.setattr(runner, "step_times", step_times)
    monkeypatch.setattr(StageModule, "training_step", training_step)
    return count


def test_recipes_are_compared_and_more_seeds_or_recipes_add_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: list[int]
) -> None:
    arguments = arguments_of(tmp_path)  # of 12 s
    assert run(monkeypatch, *arguments, "--seeds", 1) == 0
    assert steps[0] == 12 + 6
    assert run(monkeypatch, *arguments, "--seeds", 2) == 0
    assert steps[0] == 2 * (12 + 6)
    write_recipes(tmp_path, RECIPES | {"flipped | images": ["data.flip=true"]})
    assert run(monkeypatch, *arguments, "--seeds", 2) == 0
    assert steps[0] == 2 * (12 + 6 + 12)

    folder = tmp_path / "run" / "ablation"
    found = json.loads((folder / "ablation.json").read_text())
    rows = {row["recipe"]: row for row in found["recipes"]}
    assert [(row["steps"], row["ratio"], row["finished"]) for row in rows.values()] == [
        (12, 1, 2),
        (6, 0.5, 2),
        (12, 1, 2),
    ]
    assert [(each["recipe"], each["seed"]) for each in found["runs"]] == [
        (name, seed) for seed in (0, 1) for name in rows
    ]
    assert found["by"] == "denoising_error"
    numbers = {name: row["numbers"]["denoising_error"] for name, row in rows.items()}
    difference = rows["twice the batch"]["differences"]["denoising_error"]
    assert difference["mean"] == pytest.approx(numbers["twice the batch"]["mean"] - numbers["plain"]["mean"])
    assert difference["low"] < difference["mean"] < difference["high"]

    out = capsys.readouterr().out
    assert "twice the batch, seed 1, 6 steps" in out
    lines = (folder / "ablation.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5
    assert table[4].startswith(r"| flipped \| images | 12 | 1.000 | 2 | ")
    assert f"{numbers['plain']['mean']:.4g}" in table[2]
    page = (folder / "ablation.html").read_text()
    assert page.count("<circle") == 6
    assert "flipped | images" in page

    runs = [Path(each["folder"]) for each in found["runs"]]
    assert {RunFolder(path).stages[0].status for path in runs} == {"finished"}
    assert [*folder.rglob("*.ckpt")] == []
    receipts = read_receipts(runs[0])
    assert {each.conditions.split for each in receipts.numbers} == {"val"}


def test_a_diverged_run_is_shown_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: list[int]
) -> None:
    arguments = arguments_of(tmp_path, {"plain": [], "fast": ["denoiser.train.learning_rate=1e30"]}, 0.1)
    assert run(monkeypatch, *arguments, "--seeds", 1) == 0
    before = steps[0]
    assert run(monkeypatch, *arguments, "--seeds", 1) == 0
    assert steps[0] == before
    found = json.loads((tmp_path / "run" / "ablation" / "ablation.json").read_text())
    assert [row["verdict"] for row in found["recipes"]] == ["", "diverged (1 run)"]
    assert [each["state"] for each in found["runs"]] == ["finished", "diverged"]
    assert "fast, seed 0, 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipes", "arguments", "problem"),
    [
        ({"plain": [], "wrong": ["denoiser.train.optimiser=muon"]}, [], "recipe 'wrong'"),
        ({"plain": [], "same": ["denoiser.train.batch_size=4"]}, [], "'same' is the same training as 'plain'"),
        (RECIPES, ["--by", "fidd"], "did you mean 'fid'"),
        (RECIPES, ["--only", "twice"], "unknown recipe 'twice'"),
        (RECIPES, ["--minutes", "0.02"], "gives 0 steps of recipe 'twice the batch'"),
        (RECIPES, ["--steps", "8"], "give either --minutes"),
        (RECIPES, ["data.val=null"], "data.val is null"),
    ],
)
def test_mistakes_end_in_a_sentence_before_any_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: list[int],
    recipes: Any,
    arguments: list[str],
    problem: str,
) -> None:
    assert run(monkeypatch, *arguments_of(tmp_path, recipes), *arguments) == 2
    assert problem in capsys.readouterr().err
    assert steps[0] == 0


STAGES: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "clip": (
        ["clip.loss=siglip"],
        {},
        ["text_to_image_R@1", "image_to_text_R@1", "text_to_image_R@5", "image_to_text_R@5"],
    ),
    "vae": (
        ["vae.loss.terms=[{kind: perceptual, checkpoint: {clip}, weight: 0.1}]"],
        {"clip": "clip.safetensors"},
        ["probe_fid", "probe_error", "psnr", "ssim", "rfid"],
    ),
    "denoiser": (
        ["denoiser.loss=repa"],
        {"clip": "clip.safetensors", "vae": "run/vae/final.safetensors"},
        ["recall_by_image@1", "recall_by_image@5", "denoising_error", "fid", "kid"],
    ),
}
"""For each stage a recipe, the sources that it needs, and the numbers that are shown, of which the first decides."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_measured_on_val(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int], stage: str
) -> None:
    overrides, sources, numbers = STAGES[stage]
    monkeypatch.setattr(metrics, "Options", partial(Options, probe_steps=5))
    config = write_experiment(tmp_path)
    write_clip(tmp_path)
    if "vae" in sources:
        train_stage(tiny_experiment(tmp_path), "vae")
    recipes = write_recipes(tmp_path, {"plain": [], "other": overrides}, stage)
    given = [f"{name}.checkpoint={tmp_path / path}" for name, path in sources.items()]
    given += [f"{name}.train=null" for name in sources]
    arguments = ["--config", config, "--recipes", recipes, "--steps", 6, "--seeds", 2, "--repeats", 2, *given]
    before = steps[0]
    assert run(monkeypatch, *arguments) == 0
    assert steps[0] == before + 4 * 6
    folder = tmp_path / "run" / "ablation"
    found = json.loads((folder / "ablation.json").read_text())
    assert found["by"] == numbers[0]
    header = next(line for line in (folder / "ablation.md").read_text().splitlines() if line.startswith("|"))
    assert [name.strip() for name in header.split("|")[5:-3]] == numbers
    for row in found["recipes"]:
        assert all(len(row["numbers"][name]["seeds"]) == 2 for name in numbers)
    files = sorted(path.name for path in Path(found["runs"][0]["folder"]).glob("receipts*.json"))
    assert files == ["receipts-val-seed100000.json", "receipts-val.json"][stage == "clip" :]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    line = [sys.executable, str(ROOT / "tools" / "ablate.py"), *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_comparison_that_is_stopped_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, the signal of a queue, or a kill of the command alone: its trainings save their step and end."""
    arguments = [*arguments_of(tmp_path)[:-2], "--steps", "800", "--seeds", "1", "--jobs", "2"]
    folder, deadline = tmp_path / "run" / "ablation", time.monotonic() + 120
    first = start(arguments)
    while len(list(folder.glob("*/denoiser/metrics.csv"))) < 2:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(number)
    first.communicate(timeout=60)
    assert first.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGKILL: -9}[number]
    stages = [RunFolder(path.parent).stages[0] for path in folder.glob("*/denoiser")]
    while any(each.is_running for each in stages):  # after a kill, trainings notice within a second
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert any((each.folder / "last.ckpt").is_file() for each in stages)
    records = [Record.read(path.parent) for path in folder.glob("*/ablation-run.json")]
    assert any(each is not None and not each.is_done for each in records)

    second = start(arguments)
    out = second.communicate(timeout=300)[0]
    assert second.returncode == 0, out
    found = json.loads((folder / "ablation.json").read_text())
    assert [each["state"] for each in found["runs"]] == ["finished", "finished"]
    sessions = [RunFolder(Path(each["folder"])).stages[0].sessions for each in found["runs"]]
    assert max(map(len, sessions)) == 2


@pytest.mark.slow
def test_feature_networks_are_opened_before_the_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: list[int]
) -> None:
    """A CLIP without an image tower, as that of a model, judges nothing; one that is given and cannot be opened is an error."""
    monkeypatch.setattr(metrics, "Options", partial(Options, probe_steps=2))
    model = tmp_path / "model.safetensors"
    save(tiny_model(), model)
    write_clip(tmp_path)
    config, recipes = write_experiment(tmp_path), write_recipes(tmp_path, {"plain": []}, "vae")
    arguments = ["--config", config, "--recipes", recipes, "--steps", 2, "--seeds", 1, f"clip.checkpoint={model}"]
    numbers = tmp_path / "run" / "ablation" / "ablation.json"

    assert run(monkeypatch, *arguments, "clip.train=null", "--features", f"own={model}") == 2
    assert "needs a CLIP with both towers" in capsys.readouterr().err
    assert steps[0] == 0
    assert run(monkeypatch, *arguments, "clip.train=null") == 0
    assert "numbers that compare features are left out: " in capsys.readouterr().out
    assert "rfid" not in json.loads(numbers.read_text())["recipes"][0]["numbers"]
    assert run(monkeypatch, *arguments, "clip.train=null", "--features", f"own={tmp_path / 'clip.safetensors'}") == 0
    assert "rfid" in json.loads(numbers.read_text())["recipes"][0]["numbers"]
    assert steps[0] == 2  # which were measured again
