from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ldm.benchmarks.case import CASES, Setup, all_cases, selected
from ldm.benchmarks.compare import Comparison
from ldm.benchmarks.memory import peak_memory
from ldm.benchmarks.peaks import Peaks, count_operations
from ldm.benchmarks.profiling import profiled
from ldm.benchmarks.result import HEADER, Result, Side
from ldm.cli.bench import app
from ldm.errors import LdmError, MissingExtraError

PEAKS = Peaks(1e11, 1e11)
COMPARISONS = sorted(name for name, case in all_cases().items() if isinstance(case, Comparison))
OTHERS = "train-emoji", "train-sd15", "end-to-end", "train-vae", "vae-tiny"
EXACT = [name for name in COMPARISONS if not name.startswith(OTHERS)]
"""Cases whose output does not depend on random numbers that the sides draw differently."""
COMPILED = ("end-to-end-inductor", "end-to-end-openvino")
QUICK = ("unet-sd15", "vae-decode", "train-vae-gan")


def marked(name: str) -> Any:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


def small(tmp_path: Path, **changes: Any) -> Setup:
    changes = {"rounds": 1, "memory": False, "folder": tmp_path} | changes
    return Setup(torch.device("cpu"), small=True, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.mark.parametrize("name", [marked(name) for name in COMPARISONS if name not in COMPILED])
def test_both_sides_do_the_same_work(name: str, folder: Path) -> None:
    setup = small(folder)
    result = CASES[name].measure(setup, PEAKS)
    if result.parameters is not None:
        assert result.parameters[0] == result.parameters[1]
    if name in EXACT:
        assert result.difference is not None
        assert result.difference < 1e-4
    record = json.loads(json.dumps(result.record(setup)))
    assert record["case"] == name
    assert record["ratio"] == pytest.approx(record["ours"]["seconds"] / record["theirs"]["seconds"])
    assert len(record["ours"]["rounds"]) == len(record["theirs"]["rounds"]) == 1
    assert len(result.rows()) == 1 + len(result.parts) + len(result.values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latents", "latents-text"])
def test_a_case_of_the_data_gives_a_result(name: str, folder: Path) -> None:
    result = CASES[name].measure(small(folder), None)
    assert result.ratio > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["index-filters-buffer", "load-folder", "startup-emoji", "startup-import"],  # the others differ in settings alone
)
def test_a_case_of_new_processes_gives_times_and_memory_of_both_sides(name: str, folder: Path) -> None:
    result = CASES[name].measure(small(folder), None)
    assert all(side.median > 0 and side.memory for side in (result.ours, result.theirs))
    assert result.difference is None or result.difference < 1e-4


@pytest.mark.slow
def test_peak_memory_is_that_of_weights_and_activations(tmp_path: Path) -> None:
    # the small decoder has 0.1 million parameters: its memory is that of the activations, which grow with the batch
    one, many = (peak_memory("vae-decode", "ours", small(tmp_path, batch_size=n)) for n in (1, 64))
    assert one is not None
    assert many is not None
    assert 0 <= one < many


def test_a_family_and_all_select_their_cases() -> None:
    assert [case.name for case in selected(["vae", "vae-decode"])] == ["vae-decode", "vae-encode", "vae-tiny"]
    assert [case.name for case in selected(["all"])] == list(all_cases())
    with pytest.raises(LdmError, match="unknown case 'unet-sd1'; did you mean 'unet-sd15'"):
        selected(["unet-sd1"])


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    case = CASES["vae-decode"]
    assert isinstance(case, Comparison)
    broken = Comparison(case.name, case.title, case.peer, case.ours, case.theirs, ("no_such_package",))
    with pytest.raises(MissingExtraError, match="no_such_package"):
        broken.measure(small(tmp_path), None)


def test_operations_of_convolutions_and_products_are_counted_separately() -> None:
    x, kernel, matrix = torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 1, 1), torch.zeros(8, 3)
    with torch.inference_mode():
        counted = count_operations(lambda: torch.nn.functional.conv2d(x, kernel) @ matrix)
    assert counted.convolution == 2 * 64 * 4 * 2
    assert counted.matmul == 2 * 2 * 8 * 8 * 3
    assert Peaks(matmul=1, convolution=2).seconds(counted) == counted.matmul + counted.convolution / 2


def test_the_ratio_is_ours_over_theirs_and_a_row_fits_the_header() -> None:
    result = Result("case", "title", "peer", Side([1.0, 3.0, 2.0], 10**9, 0.5), Side([4.0, 4.0, 4.0], 2 * 10**9, 0.25))
    assert result.ratio == 0.5
    assert result.ratios == [0.25, 0.5, 0.75]
    (row,) = result.rows()
    assert row.index("0.50") + 4 == HEADER.index("ours/theirs") + len("ours/theirs")
    assert "50 % 25 %" in row
    assert "1.00 GB 2.00 GB" in row


def test_the_command_writes_the_results_as_json(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = [
        "vae",
        "--small",
        "--no-memory",
        "--rounds",
        "1",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--json",
        str(file),
    ]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    content = json.loads(file.read_text())
    assert [each["case"] for each in content["results"]] == ["vae-decode", "vae-encode", "vae-tiny"]
    assert content["machine"]["dtype"] == "float32"
    assert content["machine"]["peak_matmul"] > 0


def test_the_profile_lists_operators_of_both_sides(tmp_path: Path) -> None:
    case = CASES["vae-decode"]
    assert isinstance(case, Comparison)
    lines = profiled(case, small(tmp_path))
    assert sum("convolution" in line for line in lines) >= 2
    shares = [float(line.split()[-2]) for line in lines if line.endswith("%")]
    assert sum(shares) == pytest.approx(200, abs=2)


def test_the_command_lists_the_cases_and_needs_one() -> None:
    listed = CliRunner().invoke(app, ["--list"])
    assert all(name in listed.output for name in all_cases())
    assert CliRunner().invoke(app, ["--small"]).exit_code != 0
