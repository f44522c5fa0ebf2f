"""Reading of ``metrics.csv`` while a training writes to it: rows that were appended since the last time."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

CONTEXT = 256
"""Number of bytes before a position by which it is recognized."""

MAX_STEP = 2**53
"""Limit of the steps; larger ones are no whole numbers in JSON."""


@dataclass(frozen=True)
class Rows:
    """Rows of ``metrics.csv``.

    Args:
        columns: names of the metrics.
        rows: step and values of each row, in the order of ``columns``; None where there is no finite value.
        cursor: position after the last row, for :func:`read_rows`.
        restarted: True if the rows begin with the first one of the file.
        more: True if rows were left out because of the limit.
    """

    columns: list[str] = field(default_factory=list)
    rows: list[tuple[int, list[float | None]]] = field(default_factory=list)
    cursor: str = ""
    restarted: bool = True
    more: bool = False


def read_rows(path: Path, cursor: str = "", limit: int = -1) -> Rows:
    """Return the rows after a cursor. A last line that is incomplete, whose last number may be cut, is left out.

    Training writes the file again when there is a new metric, and when it resumes, from an earlier step. Then, and for any other
    cursor that is not one of this content, the rows are those from the first on.

    Args:
        path: the file; there are no rows if it cannot be read.
        cursor: that of the rows which were read before.
        limit: number of bytes after which no further row is begun; -1: no limit.
    """
    try:
        with path.open("rb") as file:
            header = file.readline()
            position = _position(file, header, cursor)
            start = file.seek(len(header) if position is None else position)
            lines = file.readlines(limit)
            more = limit >= 0 and bool(file.read(1))
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()
            columns, rows = _parse(header, lines)
            after = _cursor(file, header, start + sum(map(len, lines)))
            return Rows(columns, rows, after, position is None, more and bool(lines))
    except (OSError, csv.Error):
        return Rows()


def _position(file: BinaryIO, header: bytes, cursor: str) -> int | None:
    """Return the position of a cursor; None if the file has been written again since."""
    match = re.fullmatch(r"([0-9a-f]{1,12})-[0-9a-f]{16}", cursor)
    position = int(match[1], 16) if match else 0
    return position if position >= len(header) and _cursor(file, header, position) == cursor else None


def _cursor(file: BinaryIO, header: bytes, position: int) -> str:
    """Return a position with a hash of the header and of what is before the position."""
    start = file.seek(max(0, position - CONTEXT))
    content = hashlib.blake2b(header + file.read(position - start), digest_size=8)
    return f"{position:x}-{content.hexdigest()}"


def _parse(header: bytes, lines: list[bytes]) -> tuple[list[str], list[tuple[int, list[float | None]]]]:
    table = csv.reader(line.decode("utf-8", "replace") for line in (header, *lines))
    names = next(table, [])
    if "step" not in names:
        return [], []
    place, rows = names.index("step"), []
    for cells in table:
        step = _number(cells[place]) if len(cells) == len(names) else None
        if step is not None and 0 <= step < MAX_STEP and step.is_integer():
            rows.append((int(step), [_number(cell) for i, cell in enumerate(cells) if i != place]))
    return [name for i, name in enumerate(names) if i != place], rows


def _number(text: str) -> float | None:
    """Return the number in a cell; None if there is none, or it is not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Progress:
    """Progress of a stage by its metrics: the newest step and values, and the best validation.

    Args:
        monitor: name of the metric that selects the best checkpoint.
        higher_is_better: True if larger values of it are better.

    Attributes:
        step: newest step; 0 if there is none.
        latest: newest value of each metric.
        best: step and value of the best validation; None if there is none.
    """

    def __init__(self, monitor: str, higher_is_better: bool):
        self.monitor, self.higher_is_better = monitor, higher_is_better
        self.cursor = ""
        self._reset()

    def _reset(self) -> None:
        self.step = 0
        self.latest: dict[str, float] = {}
        self.best: tuple[int, float] | None = None

    def update(self, path: Path) -> None:
        """Read what was appended to ``metrics.csv``."""
        rows = read_rows(path, self.cursor)
        if rows.restarted:
            self._reset()
        self.cursor = rows.cursor
        for step, values in rows.rows:
            self.step = max(step, self.step)
            for name, value in zip(rows.columns, values, strict=True):
                if value is not None:
                    self.latest[name] = value
                    if name == self.monitor and self._is_better(value):
                        self.best = step, value

    def _is_better(self, value: float) -> bool:
        if self.best is None:
            return True
        return value > self.best[1] if self.higher_is_better else value < self.best[1]
