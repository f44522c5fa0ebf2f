from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.bad_samples import BAD_SAMPLES_FILE, BadSample, BadSamplesFile, Reason
from ldm.errors import TrainingError
from ldm.report.charts import Axis, Chart, Line, number, smoothed, thinned
from ldm.report.page import page
from ldm.report.run import Run
from ldm.training.metrics import MetricsFile
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment
from tests.report.runs import write_metrics, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def text_of(html: str) -> str:
    return " ".join(
        re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)).split()
    )


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html = page(Run(write_run(tmp_path)))
    assert html.startswith("<!doctype html>")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", html)
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)


def test_everything_measured_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    bad = BadSamplesFile(run / "denoiser" / BAD_SAMPLES_FILE)
    bad.start({"train": [BadSample(Reason.NO_CAPTION, detail="further samples", count=1200)]})
    bad.add(3, "train", BadSample(Reason.BROKEN_IMAGE, "k1", "a.tar", "cut", index=7, position=12))
    bad.add(3, "val", BadSample(Reason.BROKEN_IMAGE, "k2", "b.tar", "cut", index=7))
    report = {"pictures": {"train": 100, "val": 5}, "left_out": {"too small": {"dir/x.png": "8 x 8", "y.png": ""}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = text_of(page(Run(run)))
    for expected in (
        "Loss training 0.025 validation 0.25",
        "Gradient norm Before clipping. mean 1 maximum 2",
        "another training 3",
        "Loss by noise level",
        "caption finds image 50.0% best 50.0% at 40",
        "step 1 step 4 ",
        "train no caption 1,200 train broken image 1 val broken image 1 in total 1,202",
        "3 12 train broken image 1 k1 a.tar cut",
        "too small: 2 dir/x.png (8 x 8) y.png",
        "2026-01-01 00:00 0 to 20 was killed",
        "2026-01-01 02:00 1.50 20 to 40 finished",
        "torch 2.99",
        "learning_rate: 0.002",
    ):
        assert expected in text, expected


def test_names_and_captions_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path, "name='<i>alert'", "denoiser.prompts=['</script><script>alert(1)</script>']")
    MetricsFile(run / "vae" / "metrics.csv", 40).write(41, {"train/<img src=x onerror=alert(2)>": 1.0})
    bad = BadSample(Reason.BROKEN_IMAGE, "<b onclick=alert(3)>", "a.tar")
    BadSamplesFile(run / "clip" / BAD_SAMPLES_FILE).start({"train": [bad]})
    html = page(Run(run))
    for each in ("<i>alert", "</script><script>alert(1)", "<img src=x", "<b onclick"):
        assert each not in html
        assert each.replace("<", "&lt;").replace(">", "&gt;") in html


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "vae" / "metrics.csv", 0)
    file.write(50, {"train/loss": 0.5, "train/images_per_second": 7.0})
    (tmp_path / "vae" / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "vae" / "pictures" / "reconstructions_0000050.png")
    text = text_of(page(Run(tmp_path)))
    assert "7 samples/s" in text
    assert "Reconstructions" in text
    assert "Not recorded: the run is of an earlier version." in text


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"{", b"- a\n- b\n", b"name: [1\n"])
def test_damaged_files_are_left_out(tmp_path: Path, damage: bytes) -> None:
    run = write_run(tmp_path)
    others = [run / "config.yaml", run / "clip" / "metrics.csv", run / "vae" / BAD_SAMPLES_FILE]
    for path in [*run.rglob("*.png"), *run.rglob("*.jsonl"), *others]:
        path.write_bytes(damage)
    (run / "vae" / "final.safetensors").write_bytes(damage)
    assert "Loss training 0.025" in text_of(page(Run(run)))


def test_a_cut_number_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with (run / "vae" / "metrics.csv").open("a") as file:
        file.write("41,9")  # of 9.5e-05
    assert Run(run).stages[0].metrics["train/loss"][-1] == (40, 0.025)


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds nothing of a training"):
        Run(tmp_path)
    with pytest.raises(TrainingError, match="is not a folder"):
        Run(tmp_path / "absent")


def test_the_page_stays_small_over_a_long_training(tmp_path: Path) -> None:
    write_metrics(tmp_path / "denoiser", steps=4000)
    assert len(page(Run(tmp_path))) < 500_000


# Charts

POSITIVE = st.floats(1e-9, 1e9)


@given(st.lists(POSITIVE, min_size=1, max_size=9), st.booleans(), st.booleans())
def test_an_axis_contains_its_values_and_ticks(values: list[float], log: bool, vertical: bool) -> None:
    start, end = (100.0, 0.0) if vertical else (0.0, 100.0)
    axis = Axis.of(values, log, start, end)
    assert 2 <= len(axis.ticks) <= 14
    for value in (*values, *axis.ticks):
        assert -0.11 <= axis.at(value) <= 100.11


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinned_and_smoothed_lines_stay_within_their_values(values: list[float]) -> None:
    points = thinned([*enumerate(values)], limit=50)
    assert len(points) <= 50
    assert points[-1][0] == len(values) - 1
    for _, y in (*points, *smoothed(points)):
        assert min(values) - 1e-3 <= y <= max(values) + 1e-3


def test_a_loss_over_orders_of_magnitude_has_a_logarithmic_axis() -> None:
    wide = Chart("Loss", [Line("a", [(1, 1.0), (2, 1e-3)])], "loss").html
    assert "loss (log)" in wide
    assert "(log)" not in Chart("Loss", [Line("a", [(1, 1.0), (2, 0.5)])], "loss").html
    assert not Chart("Loss", [Line("a", [])]).html


@pytest.mark.parametrize(("values", "texts"), [([14.28, 14.33], "14.28 14.3 14.32 14.34"), ([1, 2], "1 1.5 2")])
def test_the_ticks_of_an_axis_have_different_texts(values: list[float], texts: str) -> None:
    assert " ".join(text for _, text in Axis.of(values, False, 100, 0).labels) == texts


def test_numbers_have_three_digits() -> None:
    assert [number(each) for each in (0.0, 0.00012, 0.5, 12.34, 1500, 2e6)] == [
        "0",
        "1.2e-4",
        "0.5",
        "12.3",
        "1.5k",
        "2M",
    ]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_a_trained_run_without_errors_and_requests(tmp_path: Path) -> None:
    """The page forbids all requests, so that one would be an error in the console; a script makes the slider."""
    assert CHROMIUM is not None
    for stage in ("vae", "clip", "denoiser"):
        train_stage(tiny_experiment(tmp_path, f"{stage}.train.images_every=3"), stage)
    path = tmp_path / "report.html"
    path.write_text(page(Run(tmp_path / "run")), encoding="utf-8")

    def console_and_dom(file: Path) -> tuple[list[str], str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
        command = [CHROMIUM or "", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return [line for line in run.stderr.splitlines() if "CONSOLE" in line], run.stdout

    console, dom = console_and_dom(path)
    assert console == []
    assert dom.count('<input type="range"') == 3
    assert dom.count('class="chart"') > 20
    broken = tmp_path / "broken.html"  # what an error would look like
    broken.write_text(path.read_text().replace("</main>", '<img src="https://example.com/x.png"></main>'))
    assert console_and_dom(broken)[0]
