"""``metrics.csv``: one file for the complete training of a stage, however often it is resumed."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """File of rows with ``step`` and named numbers; a new name adds a column.

    Args:
        path: path of the file.
        step: step at which training resumes. Later rows belong to steps that will be repeated, and are dropped.
        count: number of rows at that point; further ones are dropped. None if it is not known.
    """

    def __init__(self, path: Path, step: int, count: int | None = None):
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.columns = ["step"]
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                # A process killed while writing may leave an incomplete last row.
                rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) <= step]
            self.rows = rows[:count]
            names = reader.fieldnames or self.columns
            self.columns = [name for name in names if name == "step" or any(row[name] for row in self.rows)]
            self.rows = [{name: row[name] for name in self.columns} for row in self.rows]
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

    def sync(self) -> int:
        """Wait until all rows are on the disk, and return their number."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return len(self.rows)

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)
