"""Filters of samples, by the columns of the index: size and aspect ratio, length and language of the caption, fields.

A filter keeps the samples for which its column has a suitable value. They are applied in a fixed order to all samples at once,
before any image is read, and what each one drops is counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ldm.config import config_field
from ldm.data.measures import (
    CAPTION_LENGTH,
    LANGUAGE,
    IndexOptions,
    caption_facts,
    columns_of,
    field_facts,
    image_facts,
)
from ldm.data.shard_format import SIDECAR
from ldm.data.shard_index import Table, typed
from ldm.data.shards import Shards
from ldm.errors import ConfigError, DataError
from ldm.modalities.caption import CAPTION

DATA_FILE = "data.json"
"""File of a run folder: for each split the number of samples before and after the filters, and what each one dropped."""

_AT_ONCE = 1 << 16  # samples
_MOST = 100  # filters, which are counted in a byte

Values = tuple[str | int | float | bool, ...]


@dataclass(frozen=True)
class FieldFilter:
    """Condition on a field of the samples' JSON files, such as ``similarity`` or ``punsafe``."""

    min: float | None = config_field(None, "Smallest value of a number.")
    max: float | None = config_field(None, "Largest value of a number.")
    one_of: Values | None = config_field(None, "Values to keep; null: all.")
    none_of: Values = config_field((), "Values to drop.")
    keep_missing: bool = config_field(False, "Whether samples are kept that lack the field.")

    def __post_init__(self) -> None:
        _check_bounds(self.min, self.max, "min", "max")
        if self.min is None and self.max is None and self.one_of is None and not self.none_of:
            raise ConfigError("the filter has no condition; give min, max, one_of or none_of.")

    def __str__(self) -> str:
        given = {"min": self.min, "max": self.max, "one_of": self.one_of, "none_of": self.none_of or None}
        shown = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


@dataclass(frozen=True)
class FilterConfig:
    """Conditions on the samples of a set, all of which must hold. A sample of which a value is not known is dropped."""

    min_side: int | None = config_field(None, "Least length of the shorter side of an image in pixels.")
    max_side: int | None = config_field(None, "Greatest length of the longer side of an image in pixels.")
    min_aspect_ratio: float | None = config_field(None, "Least width / height of an image.")
    max_aspect_ratio: float | None = config_field(None, "Greatest width / height of an image.")
    min_caption_length: int | None = config_field(None, "Least number of characters of a caption.")
    max_caption_length: int | None = config_field(None, "Greatest number of characters of a caption.")
    languages: tuple[str, ...] = config_field(
        (), "Languages of captions, as ISO 639-1 codes; the index needs them (tools/prepare.py index --language)."
    )
    fields: Mapping[str, FieldFilter] = config_field(
        help="Conditions on fields of the samples' .json files by name: {similarity: {min: 0.3}, NSFW: {none_of: [NSFW]}}.",
        factory=dict,
    )
    splits: tuple[Literal["train", "val", "test"], ...] = config_field(
        ("train", "val", "test"), "Splits that are filtered."
    )

    def __post_init__(self) -> None:
        if len(self.fields) > _MOST:
            raise ConfigError(f"fields has conditions on {len(self.fields)} fields; give at most {_MOST}.")
        for name in ("side", "aspect_ratio", "caption_length"):
            _check_bounds(getattr(self, f"min_{name}"), getattr(self, f"max_{name}"), f"min_{name}", f"max_{name}")

    @property
    def given(self) -> bool:
        """True if there is a condition."""
        return next(self._filters(), None) is not None

    def select(
        self, shards: Shards, split: str, *, caption_field: str | None, caption_format: Literal["text", "lines", "json"]
    ) -> tuple[Shards, Selection]:
        """Return the samples that all filters keep, and what each dropped.

        Args:
            shards: the samples.
            split: which split they are.
            caption_field, caption_format: reading of captions, for shards without an index.

        Raises:
            DataError: an index lacks a column or measured other captions, a condition does not suit a column, or no sample is
                left.
        """
        filters = list(self._filters()) if split in self.splits else []
        if not filters:
            return shards, Selection(len(shards))
        names = list(dict.fromkeys(column for each in filters for column in each.columns))
        options = IndexOptions(tuple(self.fields), caption_field, caption_format)
        for index in shards.indices if {CAPTION_LENGTH, LANGUAGE} & {*names} else ():
            index.check_captions(caption_field, caption_format)
        failed = shards.evaluate(
            names,
            lambda table: _first_failed(filters, table),
            lambda samples: np.concatenate(
                [
                    np.zeros(0, np.uint8),
                    *(_first_failed(filters, each) for each in _facts(shards, samples, names, options)),
                ]
            ),
            optional=[name for name, condition in self.fields.items() if condition.keep_missing],
        )
        counts, kept = _counts(failed, len(filters))
        dropped = tuple(Dropped(str(each), sum(count), count[1]) for each, count in zip(filters, counts, strict=True))
        selection = Selection(len(shards), dropped)
        if selection.kept == 0:
            steps = "; ".join(f"{each.filter} drops {each.dropped}" for each in dropped if each.dropped)
            raise DataError(
                f"data.filters leaves none of the {len(shards)} samples of data.{split} ({steps}); relax them."
            )
        if selection.kept < len(shards):
            shards = shards.keep(kept)
        return shards, selection

    def _filters(self) -> Iterator[_Filter]:
        """Yield the filters in the order of the fields."""
        sides = ("width", "height")
        computed: dict[str, tuple[tuple[str, ...], Callable[[Table], Any]]] = {
            "min_side": (sides, _shorter_side),
            "max_side": (sides, _longer_side),
            "min_aspect_ratio": (sides, _aspect_ratio),
            "max_aspect_ratio": (sides, _aspect_ratio),
            "min_caption_length": ((CAPTION_LENGTH,), _column(CAPTION_LENGTH)),
            "max_caption_length": ((CAPTION_LENGTH,), _column(CAPTION_LENGTH)),
        }
        for name, (columns, value) in computed.items():
            bound = getattr(self, name)
            if bound is not None:
                yield _Filter(name, str(bound), columns, value, FieldFilter(**{name[:3]: bound}))
        if self.languages:
            condition = FieldFilter(one_of=self.languages)
            yield _Filter("languages", ", ".join(self.languages), (LANGUAGE,), _column(LANGUAGE), condition)
        for name, condition in self.fields.items():
            yield _Filter(f"fields.{name}", str(condition), (name,), _column(name), condition)


@dataclass(frozen=True)
class Dropped:
    """Samples that one filter dropped.

    Attributes:
        filter: name and condition of the filter.
        dropped: number of samples that it dropped, of those that the filters before it left.
        missing: number of those of which its value is not known.
    """

    filter: str
    dropped: int
    missing: int


@dataclass(frozen=True)
class Selection:
    """Result of the filters of a split.

    Attributes:
        samples: number of samples before the filters.
        dropped: the filters, in their order.
    """

    samples: int
    dropped: tuple[Dropped, ...] = ()

    @property
    def kept(self) -> int:
        """Number of samples that are left."""
        return self.samples - sum(each.dropped for each in self.dropped)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``data.json`` of a split: ``samples``, ``filters`` and ``kept``."""
        left, filters = self.samples, []
        for each in self.dropped:
            left -= each.dropped
            filters.append({**dataclasses.asdict(each), "left": left})
        return {"samples": self.samples, "filters": filters, "kept": self.kept}

    def describe(self, split: str) -> list[str]:
        """Return lines for the terminal; none if there are no filters."""
        if not self.dropped:
            return []
        lines = [f"data.{split}: {self.kept:,} of {self.samples:,} samples are left by data.filters"]
        for each in self.to_dict()["filters"]:
            missing = f" ({each['missing']:,} of them without a value)" if each["missing"] else ""
            lines.append(f"  {each['filter']}: {each['dropped']:,} dropped{missing}, {each['left']:,} left")
        return lines


@dataclass(frozen=True)
class SubsetConfig:
    """Random subset of the training samples. With one seed, a smaller subset is a part of each larger one."""

    images: int = config_field(help="Number of samples; all, if there are fewer.")
    seed: int = config_field(0, "Seed of the choice.")

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"images must be at least 1, not {self.images}.")

    def select(self, shards: Shards, selection: Selection) -> tuple[Shards, Selection]:
        """Return the chosen samples, and the selection with what was left out."""
        count = len(shards)
        if count <= self.images:
            return shards, selection
        chosen = np.sort(np.random.default_rng(self.seed).permutation(count)[: self.images]).astype(np.uint32)
        left_out = Dropped(f"subset: {self.images}", count - self.images, 0)
        return shards.keep(chosen), Selection(selection.samples, (*selection.dropped, left_out))


@dataclass(frozen=True)
class _Filter:
    """A condition on a value that is computed from columns."""

    name: str
    shown: str
    columns: tuple[str, ...]
    value: Callable[[Table], Any]
    condition: FieldFilter

    def __str__(self) -> str:
        return f"{self.name}: {self.shown}"

    def holds(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Return ``[n]`` of bool twice: whether the condition holds, and whether the value is known.

        Raises:
            DataError: the condition does not suit the values.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        values, condition = self.value(table), self.condition
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        known = pc.is_valid(values)
        if pa.types.is_floating(values.type):
            known = pc.and_(known, pc.invert(pc.fill_null(pc.is_nan(values), False)))
        known = known.to_numpy(zero_copy_only=False)
        holds = known.copy()
        if not known.any():  # the type of a column without values says nothing
            return holds, known
        tests = [
            (condition.min, lambda: pc.greater_equal(values, condition.min)),
            (condition.max, lambda: pc.less_equal(values, condition.max)),
            (condition.one_of, lambda: pc.is_in(values, _as_type(condition.one_of or (), values.type))),
            (condition.none_of or None, lambda: pc.invert(pc.is_in(values, _as_type(condition.none_of, values.type)))),
        ]
        try:
            for given, test in tests:
                if given is not None:
                    holds &= pc.fill_null(test(), False).to_numpy(zero_copy_only=False)
        except pa.ArrowException:
            raise DataError(
                f"data.filters.{self.name} ({self.shown}) does not suit the column {', '.join(self.columns)}, whose values have "
                f"the type {values.type}; correct the condition."
            ) from None
        return holds, known


def _first_failed(filters: Sequence[_Filter], table: Table) -> np.ndarray:
    """Return uint8 ``[n]``: 0 for the samples that pass; 2 k for those that filter k (from 1) is the first to drop, and 2 k + 1
    if its value is not known."""
    failed = np.zeros(len(table), np.uint8)
    for number, each in enumerate(filters, start=1):
        holds, known = each.holds(table)
        if each.condition.keep_missing:
            holds |= ~known
        failing = ~holds & (failed == 0)
        failed[failing] = 2 * number + ~known[failing]
    return failed


def _counts(failed: np.ndarray, filters: int) -> tuple[list[list[int]], np.ndarray]:
    """Return, for each filter, the samples with a value that it dropped and those without; and uint32 ``[m]``, the others.

    Works on a part of the samples at a time: numpy counts and numbers in int64, which would be 80 MB for ten million.
    """
    counts, kept, place = np.zeros((filters, 2), np.int64), np.empty(np.count_nonzero(failed == 0), np.uint32), 0
    for start in range(0, len(failed), _AT_ONCE):
        part = failed[start : start + _AT_ONCE]
        counts += np.bincount(part, minlength=2 * filters + 2)[2:].reshape(-1, 2)
        found = np.flatnonzero(part == 0) + start
        kept[place : place + len(found)] = found
        place += len(found)
    return counts.tolist(), kept


def _facts(shards: Shards, samples: range, names: Sequence[str], options: IndexOptions) -> Iterator[Table]:
    """Yield tables of columns of samples without an index, which are read for it.

    Raises:
        DataError: the language of the captions is needed, which only an index has.
    """
    import pyarrow as pa
    from tqdm import tqdm

    if LANGUAGE in names and samples and LANGUAGE not in (options.fields or ()):
        raise DataError(
            f"data.filters.languages needs an index with the languages, but the shard {shards.path(samples[0])} has none; "
            "make it with tools/prepare.py index --language all."
        )
    fields = options.fields and set(options.fields) & {*names}
    with tqdm(total=len(samples), desc="reading for data.filters", unit="sample", leave=False) as bar:
        for start in range(0, len(samples), _AT_ONCE):
            rows = []
            for i in samples[start : start + _AT_ONCE]:
                facts = image_facts(shards.image(i)) if "width" in names else {}
                if CAPTION_LENGTH in names:
                    facts |= _caption(shards, i, options)
                rows.append({**(field_facts(shards.member(i, SIDECAR), options) if fields else {}), **facts})
                bar.update()
            columns = columns_of(rows)
            yield pa.table({name: typed(columns.get(name, [None] * len(rows))) for name in names})


def _caption(shards: Shards, i: int, options: IndexOptions) -> dict[str, Any]:
    try:
        return caption_facts(shards.encoded(i, CAPTION), options)
    except DataError:  # which training notices and counts
        return {}


def _as_type(values: Values, kind: Any) -> Any:
    """Return values of a config as an Arrow array of the type of a column; texts of other values are JSON, as in the index.

    Raises:
        pyarrow.ArrowException: a value is not of this type.
    """
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array([each if isinstance(each, str) else json.dumps(each) for each in values], kind)
    return pa.array(list(values)).cast(kind)


def _check_bounds(low: float | None, high: float | None, low_name: str, high_name: str) -> None:
    if low is not None and high is not None and low > high:
        raise ConfigError(f"{low_name} is {low}, more than {high_name}, which is {high}; nothing is between them.")


def _shorter_side(table: Table) -> Any:
    import pyarrow.compute as pc

    return pc.min_element_wise(table["width"], table["height"], skip_nulls=False)


def _longer_side(table: Table) -> Any:
    import pyarrow.compute as pc

    return pc.max_element_wise(table["width"], table["height"], skip_nulls=False)


def _aspect_ratio(table: Table) -> Any:
    import pyarrow.compute as pc

    return pc.divide(pc.cast(table["width"], "double"), table["height"])


def _column(name: str) -> Callable[[Table], Any]:
    return lambda table: table[name]
