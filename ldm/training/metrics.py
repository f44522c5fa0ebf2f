"""``metrics.csv``: one file for the complete training of a stage, however often it is resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """File of rows with ``step`` and named numbers; a new name adds a column.

    Args:
        path: path of the file; its rows up to ``step`` are kept.
        step: step at which training resumes. Later rows belong to steps that will be repeated, and are dropped.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.columns = ["step"]
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                # A process killed while writing may leave an incomplete last row.
                self.rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) <= step]
        self._rewrite()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        row = {"step": str(step)} | {name: f"{value:.6g}" for name, value in values.items()}
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._rewrite()
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def close(self) -> None:
        """Do nothing: every row is written at once."""

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)
