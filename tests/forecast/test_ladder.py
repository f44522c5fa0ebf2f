from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.cli import forecast as command
from ldm.errors import TrainingError
from ldm.forecast.ladder import digest, rung_experiment
from ldm.forecast.plan import Rung
from ldm.forecast.recall import RecallMeasure
from ldm.report.run import Run
from ldm.training.engine import StageModule
from ldm.training.experiment import Experiment, load_config
from ldm.training.subruns import with_predecessors
from tests.commands import exit_code
from tests.experiments import PIXELS, tiny_experiment, write_experiment


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command, run in this process."""
    return exit_code(monkeypatch, command.main, "forecast.py", *arguments)


def counted(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> list[int]:
    """Count the training steps of all runs, with a call of ``then`` after each."""
    steps = [0]
    original = StageModule.training_step

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        steps[0] += 1
        then(steps[0])

    monkeypatch.setattr(StageModule, "training_step", training_step)
    return steps


def test_the_command_forecasts_and_goes_on_without_training_a_step_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_experiment(tmp_path, PIXELS)
    monkeypatch.setattr("ldm.forecast.runner.START", 5.0)  # seconds for each run, also on a machine that is busy
    assert run(monkeypatch, "--config", config, "--budget", "1 s") == 2
    least = re.search(r"a --budget of at least (\d+) s", capsys.readouterr().err)
    assert least is not None
    arguments = ["--config", config, "--budget", f"{least[1]} s"]

    def stop(step: int) -> None:
        if step == 21:  # in the second or third run
            os.kill(os.getpid(), signal.SIGTERM)

    steps = counted(monkeypatch, stop)
    assert run(monkeypatch, *arguments) == 75
    assert steps[0] == 21
    assert not (tmp_path / "run" / "forecast" / "forecast.json").exists()
    assert run(monkeypatch, *arguments) == 0
    folder = tmp_path / "run" / "forecast"
    found = json.loads((folder / "forecast.json").read_text())
    assert steps[0] == sum(each["rung"]["steps"] for each in found["runs"])

    out = capsys.readouterr().out
    assert "finished before" in out
    assert all(sentence in out for sentence in found["sentences"])
    assert any("reach a held-out loss of" in sentence for sentence in found["sentences"])
    assert found["ladder"]["limit_seconds"] <= 0.2 * found["ladder"]["full_seconds"] + 1e-6
    assert len(found["runs"]) >= 4
    assert {each["rung"]["images"] for each in found["runs"]} == {2, 8}
    full = found["forecast"]["full"]["loss"]
    assert 0 < full["low"] < full["median"] < full["high"]
    page = (folder / "forecast.html").read_text()
    assert page.count("<svg viewBox") == 3
    assert all(each.partition(" ")[0] in page for each in found["sentences"])

    runs = [path for path in folder.iterdir() if path.is_dir()]
    assert [Run(path).stages[0].status for path in runs] == ["finished"] * len(found["runs"])
    assert run(monkeypatch, *arguments) == 0  # which trains nothing
    assert steps[0] == sum(each["rung"]["steps"] for each in found["runs"])
    assert json.loads((folder / "forecast.json").read_text())["forecast"] == found["forecast"]


def test_a_run_of_the_ladder_has_its_own_width_images_steps_and_seed(tmp_path: Path) -> None:
    experiment = load_config(write_experiment(tmp_path, PIXELS))
    own = rung_experiment(experiment, Rung(0.5, 3, 40, 1))
    assert own.denoiser.model.levels[0].width == 8  # type: ignore[attr-defined]
    assert len(own.data.open("train")) == 3
    assert len(own.data.open("val")) == 8
    assert (own.seed, own.denoiser.train.max_steps, own.denoiser.train.validate_every) == (1, 40, 10)
    assert own.folder.parent == experiment.folder / "forecast"


def test_runs_of_another_config_have_other_folders(tmp_path: Path) -> None:
    experiment = load_config(write_experiment(tmp_path, PIXELS))

    def changed(**fields: Any) -> Experiment:
        return replace(
            experiment, denoiser=replace(experiment.denoiser, train=replace(experiment.denoiser.train, **fields))
        )

    same = [changed(max_steps=77), changed(log_every=3), replace(experiment, name="other")]
    others = [changed(learning_rate=1e-4), changed(batch_size=2), replace(experiment, seed=5)]
    assert {digest(each) for each in same} == {digest(experiment)}
    assert len({digest(each) for each in (experiment, *others)}) == 4


def test_a_missing_stage_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"a forecast of .*stage vae.*does not exist; train it first .*or give"):
        with_predecessors(tiny_experiment(tmp_path), "denoiser", "a forecast", hint=", or give --train-stages")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--budget", "8 hours"], "give a time above 0 with its unit"),
        (["--share", "0.5"], "at most 0.2"),
        (["--learning-rate", "tset"], "test"),
        (["data.val=null"], "held-out loss; give validation data"),
    ],
)
def test_mistakes_end_in_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    assert run(monkeypatch, "--config", write_experiment(tmp_path, PIXELS), *arguments) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.slow
def test_a_text_model_is_forecast_with_its_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stages 1 and 2 trained first, cached latents, and R@k of the images that the runs of the ladder generate."""
    from tests.diagnosis.runs import write_config, write_data

    write_data(tmp_path / "data", counts={"train": 128, "val": 64})
    config = write_config(tmp_path, tmp_path / "data")
    few = ["vae.train.max_steps=20", "clip.train.max_steps=20", "denoiser.train.batch_size=8"]
    assert run(monkeypatch, "--config", config, "--budget", "1 s", "--train-stages", *few) == 2
    least = re.search(r"a --budget of at least (\d+) s", capsys.readouterr().err)
    assert least is not None
    budget = f"{round(1.3 * int(least[1]))} s"
    assert run(monkeypatch, "--config", config, "--budget", budget, *few) == 0
    found = json.loads((tmp_path / "run" / "forecast" / "forecast.json").read_text())
    measured = [each for each in found["runs"] if each["recall"]]
    assert all(each["recall"]["among"] == 192 and each["recall"]["of"] >= 32 for each in measured)
    best = next((tmp_path / "run" / "forecast").glob("*/denoiser/best.ckpt"))
    again = RecallMeasure(with_predecessors(load_config(config, few), "denoiser", "a forecast"), 40)
    assert again(best).keys() == {"1", "5", "of", "among"}
    assert again(best) == again(best)
    assert (again(best)["of"], again(best)["among"]) == (40, 192)
    assert 0 <= again(best)["1"] <= again(best)["5"] <= 40
    assert len(measured) in (0, len(found["runs"]))  # none, if the machine is so busy that measuring takes too long
    assert set(found["forecast"]["full"]["recall"]) == ({"1", "5"} if measured else set())
    assert found["ladder"]["seconds"] < 1.5 * found["ladder"]["limit_seconds"]
