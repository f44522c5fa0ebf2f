from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.cli import evaluate as command
from ldm.evaluation.receipt import read_receipts
from ldm.evaluation.runner import verify
from ldm.evaluation.subject import Subject
from ldm.evaluation.sweep import Axis, Point, Sweep
from ldm.formats.ema_snapshots import write_snapshot
from tests.commands import exit_code
from tests.evaluation.subjects import data_of, write_subject
from tests.tiny import tiny_model


@given(values=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8), lower=st.booleans())
def test_the_front_holds_what_nothing_dominates(values: list[tuple[int, int]], lower: bool) -> None:
    axes = (Axis("cost", True), Axis("quality", lower))
    sweep = Sweep(axes, [Point({"i": i}, (), (float(x), float(y)), 0.0) for i, (x, y) in enumerate(values)])
    for (x, y), on_front in zip(values, sweep.front, strict=True):
        better = [(u, v) for u, v in values if u <= x and (v <= y if lower else v >= y) and (u, v) != (x, y)]
        assert on_front == (not better)
    assert any(sweep.front)


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> int:
    model = [
        "sweep",
        "--config",
        folder / "tiny.yaml",
        "--model",
        folder / "model.safetensors",
        "--out",
        folder / "out",
    ]
    return exit_code(monkeypatch, command.main, "evaluate.py", *model, *data_of(folder), *arguments)


def test_a_sweep_makes_a_table_a_plot_and_receipts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_subject(tmp_path)
    swept = ["--guidance", "1,3", "--steps", "1,2", "--sampler", "euler,heun", "--images", 6]
    assert call(monkeypatch, tmp_path, *swept, "--y", "recall_by_image@5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "guidance_scale",
        "num_inference_steps",
        "sampler",
        "evaluations",
        "recall_by_image@5",
        "s/image",
    ]
    assert len(lines) == 1 + 8 + 1
    points = json.loads((tmp_path / "out" / "sweep.json").read_text())
    cost = {tuple(each["settings"].values()): each["evaluations"] for each in points}
    assert cost[1.0, 2, "euler"] == 2
    assert cost[3.0, 2, "heun"] == 6  # the last step is one evaluation
    for point, line in zip(points, lines[1:], strict=False):
        (number,) = read_receipts(tmp_path / "out" / point["receipts"]).numbers
        assert number.conditions.guidance_scale == point["settings"]["guidance_scale"]
        assert number.conditions.steps == point["settings"]["num_inference_steps"]
        assert number.conditions.sampler == point["settings"]["sampler"]
        assert number.value == point["recall_by_image@5"]
        assert line.startswith("*") == point["pareto"]
    with Image.open(tmp_path / "out" / "sweep.png") as plot:
        assert plot.width > 300

    generated: list[int] = []
    original = Subject.generated

    def counted(subject: Subject, every: int | None = None) -> Any:
        generated.append(1)
        return original(subject, every)

    monkeypatch.setattr(Subject, "generated", counted)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    assert call(monkeypatch, tmp_path, *swept, "--y", "recall_by_image@5") == 0  # takes what was measured
    assert not generated
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    (tmp_path / "out" / points[3]["receipts"]).unlink()
    assert call(monkeypatch, tmp_path, *swept, "--y", "recall_by_image@5") == 0
    assert generated
    monkeypatch.setattr(Subject, "generated", original)
    capsys.readouterr()

    state = tiny_model().state_dict()
    averages = {0.05: state, 0.1: {name: 1.1 * each for name, each in state.items()}}
    write_snapshot(tmp_path / "denoiser", 10, averages)
    assert call(monkeypatch, tmp_path, "--ema-length", "0.05,0.1", "--steps", 1, "--images", 6) == 0
    again = [
        read_receipts(next((tmp_path / "out").glob(f"receipts-model=*-ema_length={length}-steps=1-images=6.json")))
        for length in (0.05, 0.1)
    ]
    first, second = (each.numbers[0] for each in again)
    assert first.conditions.differences(second.conditions).keys() == {"ema"}
    assert first.conditions.ema == "power profile, length 0.05"
    assert first.weights != second.weights
    assert [each.again for each in verify(again[1])] == [second]

    swept = [
        "--sampler",
        "ddim,euler_ancestral",
        "--setting",
        "eta=0.5",
    ]  # which the sampler of the model does not take
    assert call(monkeypatch, tmp_path, *swept, "--steps", 1, "--images", 6) == 0

    own = ["--features", f"own={tmp_path / 'clip.safetensors'}"]
    axes = ["--x", "precision", "--y", "nearest_training_image"]
    assert call(monkeypatch, tmp_path, *own, *axes, "--steps", "1,2") == 0
    (point, _) = json.loads((tmp_path / "out" / "sweep.json").read_text())
    found = read_receipts(tmp_path / "out" / point["receipts"])
    assert {each.conditions.metric for each in found.numbers} == {"precision", "nearest_training_image"}
    assert found.request["metrics"] == ["precision_recall", "memorisation"]
    capsys.readouterr()

    for arguments, message in (
        ([*own, *own, "--steps", "1"], "own, own; give each name once"),
        ([*own, "--features", f"clip={tmp_path / 'clip.safetensors'}", "--steps", "1"], "give --features once"),
        (["--ema-length", "0.5"], "the length of the average is 0.5"),
        ([], "there is nothing to sweep over"),
        (["--guidance", "1;2"], "--guidance is '1;2'; write values separated by commas"),
        (["--steps", "1", "--y", "fidd"], "unknown number 'fidd'; did you mean 'fid'"),
        (
            ["--steps", "1", "--y", "recall_by_image@3"],
            "unknown number 'recall_by_image@3'; did you mean 'recall_by_image@",
        ),
        (["--steps", "1", "--sampler", "euler,hein"], "unknown sampler 'hein'; did you mean 'heun'"),
        (["--steps", "1", "--y", "fid"], "there is no feature network; train stage clip, or give --features"),
        (["--model", tmp_path / "clip.safetensors", "--steps", "1"], "a sweep needs a model of captions or classes"),
    ):
        assert call(monkeypatch, tmp_path, *arguments) == 2
        assert message in capsys.readouterr().err
