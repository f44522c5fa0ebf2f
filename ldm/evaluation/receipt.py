"""Receipts: a number with everything that it depends on, as JSON, so that it can be compared, and computed again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import from_dict
from ldm.errors import DataError, first_line
from ldm.formats.tensors import write_atomically

FORMAT = "ldm.evaluation.1"


@dataclass(frozen=True)
class Conditions:
    """Everything apart from the evaluated weights that a number depends on; only numbers of equal conditions are ranked.

    Attributes:
        metric: name of the number.
        split: evaluated split.
        n: number of images or captions that were measured.
        data: hash of the images and captions of the split.
        reference, reference_n: hash and number of the images that they were compared with; None for none.
        size: height and width of the images in pixels; ``sampling.size`` has those of generated images if they differ.
        seed: seed of the first generated image, and of noise and training in other metrics.
        network, network_hash, resize: feature network, hash of its weights, and the filter by which it resizes images.
        sampler, steps, guidance_scale: how images were generated; None for numbers without generated images.
        sampling: all further sampling settings.
        ema: average of the weights that was evaluated.
        dtype, device: of the computation.
        backend: arguments of ``Pipeline.compile``; empty for none.
        parameters: parameters of the metric.
        interval: method of the confidence interval.
        level: confidence level.
        versions: versions of the packages.
    """

    metric: str
    split: str
    n: int
    data: str
    reference: str | None
    reference_n: int | None
    size: Sequence[int]
    seed: int
    network: str | None
    network_hash: str | None
    resize: str | None
    sampler: str | None
    steps: int | None
    guidance_scale: float | None
    sampling: Mapping[str, Any]
    ema: str
    dtype: str
    device: str
    backend: Mapping[str, Any]
    parameters: Mapping[str, Any]
    interval: str
    level: float
    versions: Mapping[str, str]

    def differences(self, other: Conditions) -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two differ, with both values; entries of mappings as ``field.entry``."""
        found: dict[str, tuple[Any, Any]] = {}
        for name in CONDITIONS:
            first, second = getattr(self, name), getattr(other, name)
            if isinstance(first, Mapping) and isinstance(second, Mapping):
                for key in sorted({*first, *second}):
                    pair = first.get(key), second.get(key)
                    if pair[0] != pair[1] or (key in first) != (key in second):
                        found[f"{name}.{key}"] = pair
            elif first != second:
                found[name] = (first, second)
        return found


CONDITIONS = tuple(each.name for each in dataclasses.fields(Conditions))
"""Names of the fields of :class:`Conditions`."""


@dataclass(frozen=True)
class Receipt:
    """A number with its interval and conditions.

    Attributes:
        weights: hash of the evaluated weights; of those of several networks, joined by ``+``.
        value, low, high: the number and the limits of its interval, which may be infinite.
        unit: unit of the number; empty for none.
        better: ``higher``, ``lower`` or ``neither``.
        conditions: what the number depends on.
    """

    weights: str
    value: float
    low: float
    high: float
    unit: str
    better: str
    conditions: Conditions

    @property
    def key(self) -> tuple[str, str]:
        """Name of the number and of its feature network: what a row of a table shows."""
        return self.conditions.metric, self.conditions.network or ""

    @property
    def text(self) -> str:
        """The number with its interval, in six significant digits at most."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{unit}"

    def contains(self, value: float) -> bool:
        """Return whether a value is within the interval."""
        return self.low <= value <= self.high

    def to_json(self) -> dict[str, Any]:
        """Return values of JSON; what is not finite becomes null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return dataclasses.asdict(self) | {
            name: each if math.isfinite(each) else None for name, each in numbers.items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Receipt:
        """Invert :meth:`to_json`.

        Raises:
            ConfigError: a field is missing, unknown or of another type.
        """
        infinite = {"value": math.nan, "low": -math.inf, "high": math.inf}
        absent: dict[str, Any] = {
            name: each for name, each in infinite.items() if name in values and values[name] is None
        }
        return dataclasses.replace(from_dict(cls, {**values, **dict.fromkeys(absent, 0.0)}), **absent)


@dataclass(frozen=True)
class Receipts:
    """Receipts of one run.

    Attributes:
        name: name of the evaluated run or model.
        created: time at which they were made, in ISO 8601.
        request: arguments that :func:`ldm.evaluation.opening.open_subject` takes to compute them again.
        numbers: the receipts.
    """

    name: str
    created: str
    request: Mapping[str, Any]
    numbers: Sequence[Receipt]

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "created": self.created,
            "request": self.request,
            "numbers": [each.to_json() for each in self.numbers],
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))


def split_of_all(paths: Sequence[Path]) -> str:
    """Return ``test`` if all run folders have receipts for it, else ``val``."""
    return "test" if all((path / _named("test")).is_file() for path in paths if path.is_dir()) else "val"


def _named(split: str) -> str:
    return f"receipts-{split}.json"


def read_receipts(path: Path, split: str | None = None) -> Receipts:
    """Read a file of receipts, or that of a run folder for a split; None: for the test split, else for val.

    Raises:
        DataError: there is none, or it is not a file of receipts.
    """
    if path.is_dir():
        path /= _named(split or split_of_all([path]))
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; write it with tools/evaluate.py --config ..., or name a file of receipts."
        )
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or "format" not in content:
            raise DataError(f"{path} is not a file of receipts; write one with tools/evaluate.py.")
        if content["format"] != FORMAT:
            raise DataError(f"it has the format {content['format']!r}, not {FORMAT}")
        numbers = [Receipt.from_json(each) for each in content["numbers"]]
        return Receipts(str(content["name"]), str(content["created"]), dict(content["request"]), numbers)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a file of receipts ({first_line(error)}); write it again with tools/evaluate.py."
        ) from None
