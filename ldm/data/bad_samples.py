"""Bad samples: those that cannot be used, why, and the file of a run that lists them.

A sample is bad if its image or its annotations cannot be decoded, which is found when it is first read, or if it is incomplete,
which is found when its shards are opened. A shard that cannot be read is an error instead, since its samples may be good.
"""

from __future__ import annotations

import csv
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import DataError
from ldm.formats.tensors import write_atomically

BAD = "bad"
"""Key of the bad samples in a batch; see :class:`ldm.data.samples.Samples`."""

BAD_SAMPLES_FILE = "bad_samples.csv"
"""Name of the file in the folder of a stage."""

MAX_NAMED = 10_000
"""Number of samples dropped for one reason, when a set is opened, that are named; the others are only counted."""


class Reason(str, Enum):
    """Reasons why a sample is bad; the values are stable names, for files and reports."""

    EMPTY_IMAGE = "empty image"
    UNKNOWN_FORMAT = "unknown image format"
    TOO_MANY_PIXELS = "too many pixels"
    BROKEN_IMAGE = "broken image"
    CAPTION_NOT_UTF8 = "caption is not UTF-8"
    CAPTION_TOO_LONG = "caption too long"
    MALFORMED_CAPTION = "malformed caption"
    MALFORMED_ANNOTATION = "malformed annotation"
    NO_IMAGE = "no image"
    NO_CAPTION = "no caption"
    DUPLICATE_KEY = "duplicate key"
    TRUNCATED_SHARD = "truncated shard"


@dataclass(frozen=True)
class BadSample:
    """A sample that is not used.

    Attributes:
        reason: category of the problem.
        key: name of the sample; empty for the rest of a truncated shard, and for samples that are only counted.
        shard: path of its shard.
        detail: description of the problem.
        index: number of the sample in its set; None if it was dropped when the set was opened.
        position: position in the sequence of the training at which it would have been; None outside of training.
        count: number of samples that the record stands for.
    """

    reason: Reason
    key: str = ""
    shard: str = ""
    detail: str = ""
    index: int | None = None
    position: int | None = None
    count: int = 1

    @property
    def where(self) -> str:
        """Key and shard, for messages."""
        return f"{self.key!r} in {self.shard}" if self.key else self.shard


class SampleError(DataError):
    """Image or annotation that cannot be decoded; ``reason`` is its category, the message the detail."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason = reason


def dropped(
    reason: Reason, detail: str, index: np.ndarray, keys: Sequence[str], path: Callable[[int], str]
) -> list[BadSample]:
    """Return the records of samples that are dropped when a set is opened, of many only the number.

    Args:
        reason, detail: what is wrong with them.
        index: their numbers.
        keys: the key of each sample.
        path: function that returns the shard of a sample.
    """
    named = [BadSample(reason, keys[i], path(i), detail) for i in index[:MAX_NAMED].tolist()]
    rest = len(index) - len(named)
    return [*named, *([BadSample(reason, detail="further samples", count=rest)] if rest else [])]


def warn_of(bad: Sequence[BadSample]) -> None:
    """Warn of the samples that shards have no complete content of, once for each reason."""
    for reason in dict.fromkeys(each.reason for each in bad):
        found = [each for each in bad if each.reason == reason]
        warnings.warn(
            f"{sum(each.count for each in found)} samples are skipped, the first of them {found[0].where}: {found[0].detail}.",
            stacklevel=4,
        )


def duplicates(shard: Path, repeated: Iterable[tuple[str, str]]) -> list[BadSample]:
    """Return the records of samples of which a shard has an earlier one, from key and suffix of each repeated member."""
    times: dict[str, int] = {}
    for (key, _), count in Counter(repeated).items():
        times[key] = max(count, times.get(key, 0))
    detail = "an earlier sample of the shard has the same key"
    return [BadSample(Reason.DUPLICATE_KEY, key, str(shard), detail, count=count) for key, count in times.items()]


def is_cut(spans: Sequence[Sequence[tuple[int, int]]], size: int) -> bool:
    """Return True if the last sample of a truncated shard is incomplete, as far as the first one shows which members it has.

    Args:
        spans: offset and size of the members of each sample, of the image first; size -1 for those that it lacks.
        size: size of the shard in bytes.
    """
    first, last = spans[0], spans[-1]
    lacks = any(one >= 0 > other for (_, one), (_, other) in zip(first, last, strict=True))
    return len(spans) == 1 or lacks or any(offset + length > size for offset, length in last)


def summary(counts: Mapping[str, int]) -> str:
    """Return counts as a phrase, largest first.

    >>> summary({"no caption": 1, "broken image": 3})
    '3 broken image, 1 no caption'
    """
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))


class BadSamplesFile:
    """``bad_samples.csv``: a row for each bad sample that a training has read, however often it is resumed.

    Columns: ``step`` (optimizer steps completed after its first use; 0 if it was dropped when the set was opened), ``split``, and
    ``position``, ``reason``, ``count``, ``key``, ``shard`` and ``detail`` of :class:`BadSample`. A sample is listed once.

    Args:
        path: path of the file; None on the ranks that do not write it.
    """

    COLUMNS = ("step", "position", "split", "reason", "count", "key", "shard", "detail")

    def __init__(self, path: Path | None = None):
        self.path = path
        self.dropped: list[dict[str, Any]] = []  # found again whenever the set is opened
        self.found: list[dict[str, Any]] = []
        self._known: set[tuple[str, int | None]] = set()
        self._counts: dict[str, Counter[str]] = {}

    def start(self, dropped: Mapping[str, Sequence[BadSample]]) -> None:
        """Write the file with the samples that were dropped when the set was opened, by split, and all that are known."""
        self.dropped = [_row(0, split, bad) for split, each in dropped.items() for bad in each]
        if self.path is not None and (self.dropped or self.found or self.path.exists()):
            self._write([*self.dropped, *self.found])

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.DictWriter(file, self.COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)

        assert self.path is not None
        write_atomically(self.path, write)

    def add(self, step: int, split: str, bad: BadSample) -> bool:
        """Append a sample, unless it is listed already, and return True if it was appended."""
        if (split, bad.index) in self._known:
            return False
        self._known.add((split, bad.index))
        self.counts(split)[bad.reason.value] += 1
        self.found.append(_row(step, split, bad))
        if self.path is not None:
            if not self.path.exists():
                self._write([])
            with self.path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
                csv.DictWriter(file, self.COLUMNS, extrasaction="ignore").writerow(self.found[-1])
        return True

    def counts(self, split: str) -> Counter[str]:
        """Return the number of samples of a split that could not be decoded, by reason."""
        return self._counts.setdefault(split, Counter())

    def state_dict(self) -> dict[str, Any]:
        return {"found": list(self.found)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = [dict(row) for row in state["found"]]
        self._known = {(row["split"], row["index"]) for row in self.found}
        self._counts = {}
        for row in self.found:
            self.counts(row["split"])[row["reason"]] += 1


def read_counts(path: str | Path) -> dict[str, Counter[str]]:
    """Return the number of bad samples in a ``bad_samples.csv`` by reason, for each split."""
    counts: dict[str, Counter[str]] = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            counts.setdefault(row["split"], Counter())[row["reason"]] += int(row["count"])
    return counts


def _row(step: int, split: str, bad: BadSample) -> dict[str, Any]:
    return {"step": step, "split": split, **dataclasses.asdict(bad), "reason": bad.reason.value}
