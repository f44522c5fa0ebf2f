"""What a caller asks of a sampling, checked and brought into lists of one entry for each picture."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from ldm.diffusion import SAMPLERS, SPECS
from ldm.errors import SamplingError, unknown

ARGUMENTS = {"text": "prompt", "label": "label"}
"""What a conditioner reads, to the name of the argument by which a caller gives it."""

SEED_LIMIT = 2**63


def conditions(reads: str | None, prompt: str | Sequence[str] | None, label: int | Sequence[int] | None) -> list[Any]:
    """What the model is to show: strings if it ``reads`` text, numbers if labels, ``[None]`` if nothing.

    Raises:
        SamplingError: what the model reads is missing or of the wrong type, or something else is given.
    """
    wanted = ARGUMENTS.get(reads or "")
    given = {"prompt": prompt, "label": label}
    for name, value in given.items():
        if value is not None and name != wanted:
            instead = f"give a {wanted}" if wanted else "leave it out"
            raise SamplingError(f"this model reads no {name}; {instead}.")
    if wanted is None:
        return [None]
    if given[wanted] is None:
        raise SamplingError(f"this model needs a {wanted}; give one or several.")
    if wanted == "prompt":
        return _strings("prompt", prompt)
    labels = _listed(label)
    if not labels or not all(isinstance(item, Integral) for item in labels):
        raise SamplingError(f"label is {label!r}; give a whole number or several.")
    return [int(item) for item in labels]


def negatives(reads: str | None, negative_prompt: str | Sequence[str] | None, n: int) -> list[str] | None:
    """A negative prompt for each of ``n`` prompts, or None if there is none.

    Raises:
        SamplingError: the model reads no text, one is no string, or there are neither one nor ``n``.
    """
    if negative_prompt is None:
        return None
    if reads != "text":
        raise SamplingError("this model reads no prompt; leave negative_prompt out.")
    given = _strings("negative_prompt", negative_prompt)
    given = given * n if isinstance(negative_prompt, str) else given
    return one_each("negative prompts", given, n, "prompts")


def seeds(seed: int | Sequence[int] | None, n: int) -> list[int]:
    """A seed for each of ``n`` pictures: those given, s, s + 1, ... from one, or so from one drawn at random.

    Raises:
        SamplingError: there are neither one nor ``n``, or one is no whole number from 0 to 2^63 - 1.
    """
    given = [secrets.randbelow(2**32)] if seed is None else _listed(seed)
    for item in given:
        if not isinstance(item, Integral) or not 0 <= int(item) < SEED_LIMIT - n:
            raise SamplingError(f"the seed {item!r} is no whole number from 0 to 2^63 - {n + 1}.")
    if seed is None or isinstance(seed, Integral):
        return [int(given[0]) + index for index in range(n)]
    return [int(item) for item in one_each("seeds", given, n, "pictures")]


def check_solver(sampler: str, eta: float | None) -> None:
    """Raises a SamplingError for an unknown sampler, or an eta outside [0, 1] or that it does not take."""
    if sampler not in SAMPLERS:
        raise SamplingError(unknown("sampler", sampler, SAMPLERS))
    if eta is None:
        return
    if "eta" not in SPECS[sampler].options:
        takers = ", ".join(name for name, spec in SPECS.items() if "eta" in spec.options)
        raise SamplingError(f"the sampler {sampler} takes no eta; leave it out, or choose one of {takers}.")
    if not 0 <= eta <= 1:
        raise SamplingError(f"eta is {eta}; it must be from 0 to 1.")


def check_counts(**counts: Any) -> None:
    """Raises a SamplingError for what is neither None nor a whole number above 0, by its name."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise SamplingError(f"{name} is {count!r}; it must be a whole number, 1 or more.")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _strings(name: str, value: Any) -> list[str]:
    given = _listed(value)
    for index, item in enumerate(given):
        if not isinstance(item, str):
            raise SamplingError(f"{name} {index} is {item!r}, which is no string.")
    if not given:
        raise SamplingError(f"the list of {name}s is empty; give one or several.")
    return given


def one_each(name: str, given: list[Any], n: int, whom: str) -> list[Any]:
    """``given``, if there are ``n`` of them; else a SamplingError."""
    if len(given) != n:
        raise SamplingError(f"{len(given)} {name} do not fit {n} {whom}; give one, or one for each.")
    return given
