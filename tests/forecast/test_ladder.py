from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.cli import forecast as command
from ldm.errors import DivergedError, TrainingError
from ldm.forecast import ladder
from ldm.forecast.answers import Forecast, Point
from ldm.forecast.bands import Band
from ldm.forecast.ladder import Result, climb, other_results, rung_experiment
from ldm.forecast.learning_rate import RangeTest
from ldm.forecast.plan import Plan, Rung, Size
from ldm.forecast.recall import RecallMeasure
from ldm.forecast.runner import Measured, Outcome, run_forecast, verify
from ldm.formats.tensors import write_json
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

    folder = tmp_path / "run" / "forecast"
    stopped: list[int] = []

    def stop(step: int) -> None:
        if not stopped and next(folder.glob("*/rung.json"), None):  # in the second run
            stopped.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    steps = counted(monkeypatch, stop)
    assert run(monkeypatch, *arguments) == 75
    assert steps == stopped
    assert not (folder / "forecast.json").exists()
    assert run(monkeypatch, *arguments) == 0
    found = json.loads((folder / "forecast.json").read_text())
    assert steps[0] == sum(each["rung"]["steps"] for each in found["runs"])

    out = capsys.readouterr().out
    assert "finished before" in out
    assert all(sentence in out for sentence in found["sentences"])
    assert any("reach a held-out loss of" in sentence for sentence in found["sentences"])
    assert found["ladder"]["seconds"] <= found["ladder"]["limit_seconds"] == 0.2 * found["ladder"]["full_seconds"]
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


def test_the_full_run_is_compared_with_its_forecast_and_not_used_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, full = load_config(write_experiment(tmp_path, PIXELS)), Rung(1, 8, 8)
    test = RangeTest((1e-3,), (1.0,), 1e-3, False)
    measured = Measured("a device", {1: Size(100, 0.1, 4)}, 8, 8, 0.0, test, 0.0)
    losses = Band(0.5, 1e-6, 1e6)
    point, plan = Point(8, 0.1, losses, {"1": Band(0.0, 0.0, 0.0)}), Plan(full, [], [], 0.8, 0.2)
    forecast = Forecast(point, losses, [], None, [], [], 1.0, 0.0, {}, losses, None)
    outcome = Outcome(experiment, measured, plan, [], [], forecast, [], 2.0, RecallMeasure(experiment, 0))
    steps = counted(monkeypatch, lambda step: None)
    found = verify(outcome)
    assert steps[0] == 8
    assert found.sentences[0].endswith("in the forecast 1e-06 to 1e+06 (80 %)")
    assert len(found.sentences) == 2  # without R@k
    assert verify(outcome) == found
    assert steps[0] == 8
    too_high = replace(found, forecast=replace(point, loss=Band(3e6, 2e6, 4e6)))
    assert "outside of the forecast" in too_high.sentences[0]
    half = replace(found, result=replace(found.result, seconds=4.0, recall={"1": 3, "of": 12}))
    assert half.sentences[1:] == [
        "R@1 0.25: outside of the forecast 0 to 0 (80 %)",
        "the ladder took 2 s, 50% of the 4 s of the full run",
    ]
    assert json.loads((tmp_path / "run" / "forecast" / "verification.json").read_text())["seconds"] == 2
    assert other_results(experiment, [], full) == []
    assert [each.rung for each in other_results(experiment, [], Rung(1, 8, 16))] == [full]


def test_a_run_that_diverges_is_left_out_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, lines, trained = load_config(write_experiment(tmp_path, PIXELS)), list[str](), list[int]()
    original = ladder.train_stage

    def train_stage(own: Experiment, stage: str) -> Path:
        trained.append(own.denoiser.train.max_steps)
        if trained[-1] == 8:
            own.folder.mkdir(parents=True)
            raise DivergedError("the loss is NaN.\nlater lines")
        return original(own, stage)

    monkeypatch.setattr(ladder, "train_stage", train_stage)
    plan = Plan(Rung(1, 8, 80), [Rung(1, 8, steps) for steps in (4, 8, 12)], [60.0] * 3, 900.0, 180.0)
    found = climb(experiment, plan, {1: 100}, RecallMeasure(experiment, 0), lines.append)
    assert [each.rung.steps for each in found.results] == [4, 12]
    assert found.diverged == [Rung(1, 8, 8)]
    assert found.seconds > sum(each.seconds for each in found.results)
    assert "run 2 of 3, width 1, 8 images, 8 steps: left out, since it diverged: the loss is NaN" in lines
    assert climb(experiment, plan, {1: 100}, RecallMeasure(experiment, 0), lines.append) == found
    assert trained == [4, 8, 12]
    assert "run 2 of 3, width 1, 8 images, 8 steps: left out, since it diverged before: the loss is NaN" in lines


def test_one_slow_run_does_not_make_all_others_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run takes 100 s more than planned, as for reading what all runs need; there is time for it."""
    experiment, taken = load_config(write_experiment(tmp_path, PIXELS)), iter([230.0, 130.0, 130.0, 130.0])

    def train_rung(experiment: Experiment, rung: Rung, *_: object) -> None:
        folder = rung_experiment(experiment, rung).folder
        folder.mkdir(parents=True)
        write_json(folder / ladder.RECORD, asdict(Result(rung, 1.0, 1.0, 100, next(taken))))

    monkeypatch.setattr(ladder, "train_rung", train_rung)
    plan = Plan(Rung(1, 8, 80), [Rung(1, 8, steps) for steps in (4, 8, 12, 16)], [130.0] * 4, 3600.0, 720.0)
    assert len(climb(experiment, plan, {1: 100}, RecallMeasure(experiment, 0), lambda line: None).results) == 4


def test_measurements_are_made_with_the_threads_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, before, found = load_config(write_experiment(tmp_path, PIXELS)), torch.get_num_threads(), list[int]()

    def measure(*_: object) -> None:
        found.append(torch.get_num_threads())
        raise TrainingError("enough")

    monkeypatch.setattr("ldm.forecast.runner._measure", measure)
    try:
        with pytest.raises(TrainingError, match="enough"):
            run_forecast(replace(experiment, trainer=replace(experiment.trainer, threads=before + 1)), 60.0)
    finally:
        torch.set_num_threads(before)
    assert found == [before + 1]


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

    def folder(experiment: Experiment, **fields: Any) -> str:
        train = replace(experiment.denoiser.train, **fields)
        changed = replace(experiment, denoiser=replace(experiment.denoiser, train=train))
        return rung_experiment(changed, Rung(width=1.0, images=2, steps=5)).folder.name

    same = [
        folder(experiment, max_steps=77),
        folder(experiment, log_every=3),
        folder(replace(experiment, name="other")),
    ]
    others = [
        folder(experiment, learning_rate=1e-4),
        folder(experiment, batch_size=2),
        folder(replace(experiment, seed=5)),
    ]
    assert set(same) == {folder(experiment)}
    assert len({folder(experiment), *others}) == 4


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

    monkeypatch.setattr("ldm.forecast.runner.START", 30.0)  # seconds for each run, also on a machine that is busy
    write_data(tmp_path / "data", counts={"train": 128, "val": 64})
    config = write_config(tmp_path, tmp_path / "data")
    few = ["vae.train.max_steps=20", "clip.train.max_steps=20", "denoiser.train.batch_size=8"]
    few += ["denoiser.sampling.num_inference_steps=4"]  # so that there is time for R@k, however steps are timed
    assert run(monkeypatch, "--config", config, "--budget", "1 s", "--train-stages", *few) == 2
    least = re.search(r"a --budget of at least (\d+) s", capsys.readouterr().err)
    assert least is not None
    budget = f"{round(1.12 * int(least[1]))} s"
    assert run(monkeypatch, "--config", config, "--budget", budget, *few) == 0
    found = json.loads((tmp_path / "run" / "forecast" / "forecast.json").read_text())
    assert len(found["runs"]) == 5
    assert all(each["recall"]["among"] == 192 and each["recall"]["of"] >= 32 for each in found["runs"])
    best = next((tmp_path / "run" / "forecast").glob("*/denoiser/best.ckpt"))
    again = RecallMeasure(with_predecessors(load_config(config, few), "denoiser", "a forecast"), 40)
    assert again(best).keys() == {"1", "5", "of", "among"}
    assert again(best) == again(best)
    assert (again(best)["of"], again(best)["among"]) == (40, 192)
    assert 0 <= again(best)["1"] <= again(best)["5"] <= 40
    assert set(found["forecast"]["full"]["recall"]) == {"1", "5"}
    assert found["ladder"]["seconds"] <= found["ladder"]["limit_seconds"]
