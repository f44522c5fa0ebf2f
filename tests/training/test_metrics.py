from __future__ import annotations

import csv
from pathlib import Path

from ldm.training.metrics import MetricsFile


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_name_adds_a_column_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "metrics.csv"
    file = MetricsFile(path, 0)
    file.write(1, {"loss": 0.5})
    file.write(2, {"loss": 0.25, "psnr": 20.0})
    file.write(3, {"psnr": 21.0})
    assert rows(path) == [
        {"step": "1", "loss": "0.5", "psnr": ""},
        {"step": "2", "loss": "0.25", "psnr": "20"},
        {"step": "3", "loss": "", "psnr": "21"},
    ]


def test_rows_of_steps_that_are_taken_anew_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write(step, {"loss": step})
    MetricsFile(path, 3).write(4, {"loss": 40, "other": 1})
    assert [(row["step"], row["loss"]) for row in rows(path)] == [("1", "1"), ("2", "2"), ("3", "3"), ("4", "40")]
    assert rows(path)[-1]["other"] == "1"


def test_a_row_that_was_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    file.write(1, {"loss": 0.5})
    file.write(2, {"loss": 0.25})
    for cut in ("", "2", "2,0.2"):  # the whole row, a part of the step, a part of a number
        whole = path.read_text().splitlines()
        path.write_text("\n".join([*whole[:2], cut]))
        MetricsFile(path, 1)
        assert rows(path) == [{"step": "1", "loss": "0.5"}]


def test_a_run_that_begins_anew_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsFile(path, 0).write(7, {"loss": 1.0})
    MetricsFile(path, 0)
    assert rows(path) == []
