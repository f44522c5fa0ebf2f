"""Result of a case, as a row of the table and as a record of the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ldm.benchmarks.case import Setup


@dataclass(frozen=True)
class Side:
    """Measurements of one side.

    Attributes:
        seconds: of each round.
        memory: peak memory in bytes; None = not measured.
        share_of_peak: time that its operations take at the machine's peak throughput, divided by the measured time.
    """

    seconds: Sequence[float]
    memory: int | None = None
    share_of_peak: float | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return median(self.seconds)

    def record(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "seconds": self.median,
            "rounds": list(self.seconds),
            "memory_bytes": self.memory,
            "share_of_peak": self.share_of_peak,
        }


@dataclass(frozen=True)
class Result:
    """Measurements of both sides of a case.

    Attributes:
        case, title, peer: of the case.
        ours, theirs: the two sides.
        difference: largest difference of the outputs, relative to the largest output of the other side; None = not compared.
        parameters: numbers of parameters of both networks; None = there is none.
        parts: results of parts of the work, by their titles.
        values: further values, such as losses.
    """

    case: str
    title: str
    peer: str
    ours: Side
    theirs: Side
    difference: float | None = None
    parameters: tuple[int, int] | None = None
    parts: tuple[Result, ...] = ()
    values: tuple[tuple[str, Any], ...] = ()

    @property
    def ratio(self) -> float:
        """Median time of ours divided by that of theirs; below 1, ours is faster."""
        return self.ours.median / self.theirs.median

    @property
    def ratios(self) -> list[float]:
        """The ratio of each round, in ascending order."""
        return sorted(a / b for a, b in zip(self.ours.seconds, self.theirs.seconds, strict=True))

    def record(self, setup: Setup) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "case": self.case,
            "title": self.title,
            "peer": self.peer,
            "device": str(setup.device),
            "dtype": str(setup.dtype).removeprefix("torch."),
            "compile": setup.compile,
            "compile_peer": setup.compile_peer,
            "small": setup.small,
            "ours": self.ours.record(),
            "theirs": self.theirs.record(),
            "ratio": self.ratio,
            "difference": self.difference,
            "parameters": self.parameters,
            "parts": [part.record(setup) for part in self.parts],
            **dict(self.values),
        }

    def rows(self) -> list[str]:
        """Return the lines of the table."""
        lines = [_row(self.case, self)]
        lines += [_row(f"  {part.title}", part) for part in self.parts]
        lines += [f"  {name}: {value}" for name, value in self.values]
        return lines


HEADER = (
    f"{'case':27}{'ours':>10}{'theirs':>10}{'ours/theirs':>13}{'(rounds)':>13}{'of peak':>12}{'memory':>20}"
    f"{'difference':>12}  theirs"
)
"""First line of the table."""


def _row(name: str, result: Result) -> str:
    ours, theirs, ratios = result.ours, result.theirs, result.ratios
    spread = f"{ratios[0]:.2f}–{ratios[-1]:.2f}"
    shares = _pair(ours.share_of_peak, theirs.share_of_peak, lambda share: f"{100 * share:.0f} %")
    memory = _pair(ours.memory, theirs.memory, lambda size: f"{size / 1e9:.2f} GB")
    difference = "" if result.difference is None else f"{result.difference:.0e}"
    return (
        f"{name:27}{_seconds(ours.median):>10}{_seconds(theirs.median):>10}{result.ratio:13.2f}{spread:>13}{shares:>12}"
        f"{memory:>20}{difference:>12}  {result.peer}"
    )


def _pair(ours: Any, theirs: Any, text: Any) -> str:
    return "" if ours is None or theirs is None else f"{text(ours)} {text(theirs)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
