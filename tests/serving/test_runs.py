from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.bad_samples import BAD_SAMPLES_FILE, BadSample, BadSamplesFile, Reason
from ldm.errors import ConfigError
from ldm.report.metrics import read_rows
from ldm.report.run import Run
from ldm.serving.runs import RunsFolder, find_runs, flattened
from ldm.training.environment import SESSIONS
from ldm.training.metrics import MetricsFile
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment
from tests.serving.servers import Running, serving

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which one stage was trained."""
    experiment = tiny_experiment(tmp_path_factory.mktemp("trained"), "vae.train.images_every=3")
    train_stage(experiment, "vae")
    return experiment.folder


@pytest.fixture(scope="module")
def folder(trained: Path) -> Path:
    """A folder of runs: one that was trained, a run in a folder of runs, and folders that are broken or no runs."""
    runs = trained.parent / "runs"
    shutil.copytree(trained, runs / "trained")
    write_metrics(runs / "sweep" / "a b&c", 5)
    (runs / "empty").mkdir()
    (runs / "begun").mkdir()
    (runs / "begun" / "config.yaml").write_text("name: begun\n")
    (runs / "notes").mkdir()
    (runs / "notes" / "secret.txt").write_text("secret")
    (runs / "around").symlink_to(runs)
    write_metrics(runs / "broken", 3)
    for name in (SESSIONS, "final.safetensors", ".lock.json", BAD_SAMPLES_FILE):
        (runs / "broken" / "vae" / name).write_bytes(b'{"\xff')
    (runs / "broken" / "clip").write_text("a file where a folder is expected")
    (runs / "broken" / "denoiser" / "metrics.csv").mkdir(parents=True)
    write_metrics(runs / "odd", 3)
    (runs / "odd" / "config.yaml").write_text("vae: 3\nclip: {train: [1]}\nname: {a: 1}\n")
    (runs / "odd" / "vae" / SESSIONS).write_text('{"event": "start", "step": "x", "run": 5}\n[1]\n')
    (runs / "odd" / "vae" / ".lock.json").write_text("[1]")
    return runs


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("served"), runs=folder) as running:
        yield running


def write_metrics(run: Path, steps: int, stage: str = "vae") -> MetricsFile:
    file = MetricsFile(run / stage / "metrics.csv", 0)
    for step in range(1, steps + 1):
        file.write(step, {"train/loss": 1 / step, "system/samples_per_second": 8.0})
    return file


def get(server: Running, path: str) -> Any:
    response = server.http.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def points(rows: list[Any], columns: list[str], name: str) -> list[tuple[int, float]]:
    place = columns.index(name)
    return [(step, values[place]) for step, values in rows if values[place] is not None]


def test_the_list_has_the_progress_of_each_stage(server: Running, folder: Path) -> None:
    runs = {run["name"]: run for run in get(server, "/v1/runs")["runs"]}
    assert set(runs) == {"trained", "sweep/a b&c", "begun", "broken", "odd"}
    (stage,) = runs["trained"]["stages"]
    assert (stage["name"], stage["title"], stage["status"]) == ("vae", "VAE", "finished")
    assert (stage["step"], stage["max_steps"], stage["monitor"]) == (6, 6, "PSNR")
    assert stage["best"] == list(Run(folder / "trained").stages[0].best or ())
    assert runs["trained"]["status"] == "finished"
    assert runs["sweep/a b&c"]["stages"][0]["samples_per_second"] == 8


def test_broken_runs_are_listed_with_a_sentence(server: Running) -> None:
    runs = {run["name"]: run for run in get(server, "/v1/runs")["runs"]}
    assert runs["begun"]["status"] == "unreadable"
    assert "holds nothing of a training" in runs["begun"]["error"]
    assert runs["broken"]["status"] == "stopped"
    assert [(stage["name"], stage["step"]) for stage in runs["broken"]["stages"]] == [("vae", 3)]
    for name in runs:
        for path in ("", "/report", "/report.html", "/stages/clip/metrics", "/stages/denoiser/metrics"):
            response = server.http.get(f"/v1/runs/{quote(name, safe='')}{path}")
            assert response.status_code == 200 or response.json()["error"]["message"].endswith((".", "?"))
            assert response.status_code < 500


def test_a_run_is_described_with_its_config_and_its_images(server: Running, folder: Path) -> None:
    run = get(server, "/v1/runs/trained")
    assert run["config"]["vae.train.learning_rate"] == "0.002"
    assert run["config"]["vae.model.widths"] == "[8, 16]"
    (previews,) = run["stages"][0]["images"]
    assert [step for step, _ in previews["files"]] == [3, 6]
    for _, name in previews["files"]:
        response = server.http.get(f"/v1/runs/trained/stages/vae/images/{name}")
        assert response.headers["content-type"] == "image/png"
        assert response.content == (folder / "trained" / "vae" / "images" / name).read_bytes()


def test_the_metrics_are_those_of_the_file_with_the_charts_of_the_report(server: Running, folder: Path) -> None:
    found = get(server, "/v1/runs/trained/stages/vae/metrics")
    for name, expected in Run(folder / "trained").stages[0].metrics.items():
        assert points(found["rows"], found["columns"], name) == expected
    charts = {chart["title"]: [curve["metric"] for curve in chart["curves"]] for chart in found["charts"]}
    assert charts["Reconstruction: PSNR"] == ["val/psnr"]
    assert sorted(itertools.chain(*charts.values())) == sorted(found["columns"])


def test_rows_that_are_appended_arrive_alone(server: Running, folder: Path) -> None:
    file = write_metrics(folder / "live", 3)
    path = "/v1/runs/live/stages/vae/metrics"
    first = get(server, path)
    assert [step for step, _ in first["rows"]] == [1, 2, 3]
    file.write(4, {"train/loss": 0.25})
    second = get(server, f"{path}?after={first['cursor']}")
    assert (second["rows"], second["restarted"], second["charts"]) == ([[4, [0.25, None]]], False, None)
    with file.path.open("a") as opened:
        opened.write("5,0.2")
        opened.flush()
        torn = get(server, f"{path}?after={second['cursor']}")
        assert (torn["rows"], torn["cursor"]) == ([], second["cursor"])
        opened.write("5,1\n")
    assert get(server, f"{path}?after={torn['cursor']}")["rows"] == [[5, [0.25, 1.0]]]
    assert {run["name"]: run for run in get(server, "/v1/runs")["runs"]}["live"]["stages"][0]["step"] == 5


def test_a_training_that_resumes_or_adds_a_metric_starts_the_rows_again(server: Running, folder: Path) -> None:
    path = "/v1/runs/resumed/stages/vae/metrics"
    write_metrics(folder / "resumed", 9)
    cursor = get(server, path)["cursor"]
    file = MetricsFile(folder / "resumed" / "vae" / "metrics.csv", 6)
    for step in range(7, 13):
        file.write(step, {"train/loss": 2.0, "system/samples_per_second": 9.0})
    again = get(server, f"{path}?after={cursor}")
    assert again["restarted"]
    assert [step for step, _ in again["rows"]] == list(range(1, 13))
    file.write(13, {"val/psnr": 20.0})
    added = get(server, f"{path}?after={again['cursor']}")
    assert added["restarted"]
    assert [values[-1] for _, values in added["rows"]] == [None] * 12 + [20.0]
    assert "Reconstruction: PSNR" in [chart["title"] for chart in added["charts"]]


def test_a_stage_that_is_being_trained_is_live_with_the_time_that_is_left(server: Running, folder: Path) -> None:
    write_metrics(folder / "now", 3)
    (folder / "now" / "config.yaml").write_text("vae: {train: {max_steps: 103}}\n")
    stage = folder / "now" / "vae"
    start = {"event": "start", "step": 0, "pid": 1, "run": {"batch_size": 4, "accumulate": 2, "devices": 1}}
    (stage / SESSIONS).write_text(json.dumps(start) + "\n")

    def now() -> dict[str, Any]:
        return next(run for run in get(server, "/v1/runs")["runs"] if run["name"] == "now")

    assert now()["status"] == "stopped"
    (stage / ".lock.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": ""}))
    assert (now()["status"], now()["stages"][0]["seconds_left"]) == ("training", 100)


def test_an_unchanged_response_is_not_sent_again(server: Running) -> None:
    for path in ("/v1/runs", "/v1/runs/trained", "/v1/runs/trained/stages/vae/metrics"):
        first = server.http.get(path)
        again = server.http.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_responses_with_many_rows_are_bounded(server: Running, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.serving.runs_api.METRICS_BYTES", 500)
    write_metrics(folder / "long", 200)
    cursor, steps, parts = "", [], 0
    while True:
        found = get(server, f"/v1/runs/long/stages/vae/metrics?after={cursor}")
        cursor, parts = found["cursor"], parts + 1
        steps += [step for step, _ in found["rows"]]
        assert len(found["rows"]) < 100
        if not found["more"]:
            break
    assert steps == list(range(1, 201))
    assert parts > 4


def test_the_report_is_that_of_the_command_without_inline_styles(server: Running, folder: Path) -> None:
    html = "".join(each["html"] for each in get(server, "/v1/runs/trained/report")["sections"])
    assert "Environment of vae 1" in html
    assert "learning_rate: 0.002" in html
    assert " style=" not in html  # which the policy of the page does not allow
    assert "<script" not in html
    document = server.http.get("/v1/runs/trained/report.html")
    assert document.headers["content-disposition"] == "attachment"
    assert "Reconstruction: PSNR" in document.text


def test_names_are_escaped_in_the_report(server: Running, folder: Path) -> None:
    run = folder / "<i>run"
    write_metrics(run, 3, "denoiser")
    BadSamplesFile(run / "denoiser" / BAD_SAMPLES_FILE).start(
        {"train": [BadSample(Reason.BROKEN_IMAGE, "<b onclick=alert(3)>", "a.tar")]}
    )
    html = "".join(each["html"] for each in get(server, f"/v1/runs/{quote('<i>run')}/report")["sections"])
    assert "&lt;b onclick" in html
    assert "<b onclick" not in html


@pytest.mark.parametrize(
    "path",
    [
        "..%2Fnotes",
        "notes",
        "%2Fetc",
        "trained%2F..%2Ftrained",
        "around%2Ftrained",
        "trained/stages/..%2F..%2Fnotes/metrics",
        "trained/stages/vae/images/..%2Fmetrics.csv",
        "trained/stages/vae/images/%2Fetc%2Fpasswd",
        "trained/stages/vae/images/final.safetensors",
        "trained/stages/nothing/metrics",
        "%00/report",
    ],
)
def test_only_what_is_listed_can_be_requested(server: Running, path: str) -> None:
    response = server.http.get(f"/v1/runs/{path}")
    assert response.status_code == 404, response.text
    assert response.json()["error"]["message"]
    assert "secret" not in response.text


def test_a_link_in_the_place_of_an_image_does_not_reach_other_files(server: Running, folder: Path) -> None:
    (folder / "trained" / "vae" / "images" / "linked_0000001.png").symlink_to(folder / "notes" / "secret.txt")
    response = server.http.get("/v1/runs/trained/stages/vae/images/linked_0000001.png")
    assert response.status_code == 404
    assert "secret" not in response.text


def test_runs_need_the_key_and_no_model(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path, (KEY,), sources={}, runs=folder) as server:
        assert get(server, "/v1/runs")["runs"]
        assert get(server, "/v1/models")["data"] == []
        refused = server.http.post("/v1/jobs", json={"prompt": "red apple"})
        assert refused.status_code == 404
        assert "has no model" in refused.json()["error"]["message"]
        for path in ("/v1/runs", "/v1/runs/trained", "/v1/runs/trained/report.html"):
            assert httpx.get(f"{server.url}{path}").status_code == 401


def test_without_the_option_there_are_no_runs(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.http.get("/v1/runs").status_code == 404


def test_a_run_folder_can_be_given_itself(trained: Path) -> None:
    assert list(find_runs(trained)) == [trained.name]
    assert [run.status for run in RunsFolder(trained).summaries()] == ["finished"]


def test_a_folder_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        RunsFolder(tmp_path / "absent")


def test_only_files_that_change_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = RunsFolder(folder)
    runs.summaries()
    read: list[Path] = []
    original: Callable[..., Any] = read_rows
    monkeypatch.setattr(
        "ldm.report.metrics.read_rows", lambda path, *given: read.append(path) or original(path, *given)
    )
    runs.summaries()
    assert {path.parents[1].name for path in read} <= {"odd", "begun"}  # which cannot be read


@given(st.binary(max_size=300), st.binary(max_size=60), st.text(max_size=30), st.sampled_from([-1, 1, 20]))
def test_any_content_and_any_cursor_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, added: bytes, cursor: str, limit: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "metrics.csv"
    path.write_bytes(b"step,a\n" + content)
    first = read_rows(path, cursor, limit)
    path.write_bytes(b"step,a\n" + content + added)
    read_rows(path, first.cursor, limit)
    path.write_bytes(content)
    read_rows(path, first.cursor, limit)


@given(st.lists(st.integers(0, 400), max_size=6))
def test_parts_of_a_growing_file_are_the_whole(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    path = tmp_path_factory.mktemp("growing") / "metrics.csv"
    content = b"step,a,b\n" + b"".join(b"%d,%d.5,\n" % (i, i) for i in range(40))
    found, cursor = [], ""
    for cut in [*sorted(cuts), len(content)]:
        path.write_bytes(content[: max(cut, 9)])
        rows = read_rows(path, cursor)
        found, cursor = ([] if rows.restarted else found) + rows.rows, rows.cursor
    assert found == [(i, [i + 0.5, None]) for i in range(40)]


def test_configs_are_flattened_for_comparison() -> None:
    values = {
        "a": {"b": 1, "c": [1, 2]},
        "levels": [{"width": 8}, {"width": 16, "text": "x"}],
        "none": None,
        "empty": {},
    }
    assert dict(flattened(values)) == {
        "a.b": "1",
        "a.c": "[1, 2]",
        "levels[0].width": "8",
        "levels[1].width": "16",
        "levels[1].text": "x",
        "none": "null",
        "empty": "{}",
    }
