"""Tables of receipts: of one run, and of several, in which only numbers of equal conditions are ranked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.errors import ConfigError, some, unknown
from ldm.evaluation.receipt import CONDITIONS, Receipt, Receipts

WIDTH = 60
"""Longest value of a condition that is printed."""


@dataclass(frozen=True)
class Ranking:
    """Ranking of numbers of the same name.

    Attributes:
        order: indices of the receipts, the best first; empty if they are not ranked.
        reason: why they are not ranked; empty if they are.
        separated: whether the interval of the best one overlaps with no other.
    """

    order: Sequence[int]
    reason: str = ""
    separated: bool = False


def rank(receipts: Sequence[Receipt], across: Sequence[str] = ()) -> Ranking:
    """Rank receipts of one number, unless their conditions differ.

    Args:
        receipts: one for each run.
        across: fields of :class:`~ldm.evaluation.receipt.Conditions` that may differ, since their effect is what is compared.

    Raises:
        ConfigError: there is no such field.
    """
    _check_fields(across)
    first, *others = receipts
    for other in others:
        different = {
            name: pair
            for name, pair in first.conditions.differences(other.conditions).items()
            if name.partition(".")[0] not in across
        }
        if (first.better, first.unit) != (other.better, other.unit):
            different["better or unit"] = (f"{first.better} {first.unit}", f"{other.better} {other.unit}")
        if different:
            return Ranking(
                (), "; ".join(f"{name} differs ({_short(a)}, {_short(b)})" for name, (a, b) in different.items())
            )
    if first.better == "neither":
        return Ranking((), "neither a higher nor a lower value is better")
    if any(not math.isfinite(each.value) for each in receipts):
        return Ranking((), "a value is not finite")
    sign = 1 if first.better == "lower" else -1
    order = sorted(range(len(receipts)), key=lambda i: sign * receipts[i].value)
    best = receipts[order[0]]
    separated = all(best.high < each.low or best.low > each.high for each in (receipts[i] for i in order[1:]))
    return Ranking(order, separated=separated and len(order) > 1)


def _check_fields(names: Sequence[str]) -> None:
    for name in names:
        if name not in CONDITIONS:
            raise ConfigError(unknown("field of receipts", name, CONDITIONS))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."


def of_one(receipts: Receipts) -> str:
    """Return the table of one run: number, value, interval, n, and feature network."""
    rows = [("metric", "value [interval]", "n", "network")]
    rows += [
        (each.conditions.metric, each.text, str(each.conditions.n), each.conditions.network or "")
        for each in receipts.numbers
    ]
    return aligned(rows)


def of_several(runs: Sequence[Receipts], across: Sequence[str] = ()) -> str:
    """Return the table over runs: a row for each number, a column for each run, and the ranking or why there is none.

    Raises:
        ConfigError: ``across`` has a field that receipts do not have.
    """
    _check_fields(across)
    names = [chr(ord("A") + i) if i < 26 else f"run {i + 1}" for i in range(len(runs))]
    by_key = [{each.key: each for each in run.numbers} for run in runs]
    rows = [("metric", *names, "worst < best")]
    refused: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in by_key for key in run):
        there = [(name, run[key]) for name, run in zip(names, by_key, strict=True) if key in run]
        verdict = ""
        if len(there) > 1:
            found = rank([each for _, each in there], across)
            if found.order:
                verdict = _chain([there[i] for i in reversed(found.order)])
                verdict += "" if found.separated else " (intervals overlap)"
            else:
                verdict = "not ranked"
                refused.setdefault(found.reason, []).append(key[0])
        values = [run[key].text if key in run else "" for run in by_key]
        rows.append((f"{key[0]} ({key[1]})" if key[1] else key[0], *values, verdict))
    lines = [f"{name} = {run.name}, {run.created}" for name, run in zip(names, runs, strict=True)]
    if across:
        lines.append(f"ranked in spite of differences in: {', '.join(across)}")
    lines += ["", aligned(rows)]
    lines += [f"not ranked ({some(metrics)}): {reason}" for reason, metrics in refused.items()]
    return "\n".join(lines)


def _chain(ordered: Sequence[tuple[str, Receipt]]) -> str:
    """Return names from the worst to the best, with ``=`` between equal values."""
    text = ordered[0][0]
    for (_, before), (name, receipt) in itertools.pairwise(ordered):
        text += f" {'=' if before.value == receipt.value else '<'} {name}"
    return text


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
