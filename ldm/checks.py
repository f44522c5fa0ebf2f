"""Checks of numbers that a caller gives: Python's, NumPy's or torch's become plain ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from ldm.errors import SamplingError


def plain(value: Any) -> Any:
    """Convert NumPy scalars, arrays and tensors, also inside a list or tuple, to Python numbers and lists.

    A tensor without values (on the meta device, or sparse) is returned as it is.
    """
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except (RuntimeError, TypeError):  # of a tensor without values, or a class with such an attribute
        return value


def shown(value: Any) -> str:
    """Return the representation of a value for a message, of bounded length."""
    try:
        text = repr(value)
    except Exception:  # of integers of thousands of digits, and of any foreign class
        return f"of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> int | float:
    """Return ``value`` as a Python number from ``least`` to ``most``.

    Raises:
        SamplingError: it is not a number, not finite in fp32, or out of range.
    """
    given = plain(value)
    given = float(given) if isinstance(given, Decimal) and given.is_finite() else given
    is_number = isinstance(given, Real) and not isinstance(given, bool)
    if not is_number or not -FP32_MAX <= given <= FP32_MAX:
        raise SamplingError(f"{name} is {shown(given)}; it must be a finite number.")
    if not least <= given <= most:
        limits = f"from {least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
        raise SamplingError(f"{name} is {shown(given)}; it must be {limits}.")
    return int(given) if isinstance(given, Integral) else float(given)


def whole_number(name: str, value: Any, least: int = 1, most: int = 10**6) -> int:
    """Return ``value`` as an int from ``least`` to ``most``, which is by default beyond any use.

    Raises:
        SamplingError: it is not a whole number, or out of range.
    """
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, Integral) or given < least:
        raise SamplingError(f"{name} is {shown(given)}; it must be a whole number, {least} or more.")
    if int(given) > most:
        raise SamplingError(f"{name} is {shown(given)}; it must be a whole number from {least} to {most}.")
    return int(given)


def numbers(name: str, value: Any) -> list[int | float]:
    """Return the items of an ordered collection as Python numbers.

    Raises:
        SamplingError: it is not such a collection of finite numbers.
    """
    given = plain(value)
    if not is_ordered(given):
        raise SamplingError(f"{name} is {shown(given)}; give a list of numbers.")
    return [number(f"{name}[{index}]", item) for index, item in enumerate(given)]


def number_or_numbers(name: str, value: Any) -> int | float | list[int | float]:
    """Return a number, or the items of a collection of numbers.

    Raises:
        SamplingError: it is neither.
    """
    given = plain(value)
    return numbers(name, given) if is_ordered(given) else number(name, given)


def is_ordered(value: Any) -> bool:
    """Return whether a value is an ordered collection: neither a string, nor a set, nor a mapping, nor a tensor of one number."""
    scalar = getattr(value, "ndim", None) == 0 or getattr(value, "is_meta", False) or getattr(value, "is_sparse", False)
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | set | frozenset | Mapping) and not scalar


FP32_MAX = 3.4028234663852886e38
"""Largest number of fp32, in which sampling computes."""
