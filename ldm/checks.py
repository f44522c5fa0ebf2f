"""Checks of numbers that a caller gives: Python's, NumPy's or torch's become plain ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from ldm.errors import SamplingError


def plain(value: Any) -> Any:
    """Convert NumPy scalars, arrays and tensors, also inside a list or tuple, to Python numbers and lists."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> int | float:
    """Return ``value`` as a Python number from ``least`` to ``most``.

    Raises:
        SamplingError: it is not a number, not finite in fp32, or out of range.
    """
    given = plain(value)
    is_number = isinstance(given, Real) and not isinstance(given, bool)
    if not is_number or not -FP32_MAX <= given <= FP32_MAX:
        raise SamplingError(f"{name} is {given!r}; it must be a finite number.")
    if not least <= given <= most:
        limits = f"from {least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
        raise SamplingError(f"{name} is {given!r}; it must be {limits}.")
    return int(given) if isinstance(given, Integral) else float(given)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as an int of at least ``least``.

    Raises:
        SamplingError: it is not a whole number, or too small.
    """
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, Integral) or given < least:
        raise SamplingError(f"{name} is {given!r}; it must be a whole number, {least} or more.")
    return int(given)


def numbers(name: str, value: Any) -> list[int | float]:
    """Return the items of a collection as Python numbers.

    Raises:
        SamplingError: it is not a collection of finite numbers.
    """
    given = plain(value)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise SamplingError(f"{name} is {given!r}; give a list of numbers.")
    return [number(f"{name}[{index}]", item) for index, item in enumerate(given)]


def number_or_numbers(name: str, value: Any) -> int | float | list[int | float]:
    """Return a number, or the items of a collection of numbers.

    Raises:
        SamplingError: it is neither.
    """
    given = plain(value)
    is_collection = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    return numbers(name, given) if is_collection else number(name, given)


FP32_MAX = 3.4028234663852886e38
"""Largest number of fp32, in which sampling computes."""
