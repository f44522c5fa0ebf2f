"""What a user can get wrong. Each message is one sentence: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class LdmError(ValueError):
    """A user's mistake; commands print its message alone and exit with code 2."""


class ConfigError(LdmError):
    """A configuration that cannot be: unknown key, wrong type, impossible combination."""


class DataError(LdmError):
    """Pictures, captions or shards that are missing or cannot be read."""


class CheckpointError(LdmError):
    """A file of weights that is missing, broken, or does not fit what it is wanted for.

    ``details`` are lines for who wants to know all, where the message names a few.
    """

    def __init__(self, message: str, details: Iterable[str] = ()):
        super().__init__(message)
        self.details = tuple(details)


class SamplingError(LdmError):
    """A request to the pipeline that cannot be met: prompt, size, sampler, noise levels."""


class TrainingError(LdmError):
    """A training that cannot start or go on: missing predecessor, loss that is not finite."""


class MissingExtraError(LdmError):
    """An optional dependency that the request needs and the environment lacks."""


def missing_extra(package: str, needed_for: str, extra: str) -> MissingExtraError:
    """The error for an absent optional dependency, naming the extra that brings it."""
    return MissingExtraError(f"{needed_for} needs the package {package!r}; install it with pip install 'ldm[{extra}]'.")


def first_line(error: BaseException) -> str:
    """What an error of another library says first, as a clause of one of ours, of bounded length."""
    line = str(error).strip().split("\n")[0].rstrip(".")
    return line if len(line) <= 500 else f"{line[:500]}..."


def some(names: Sequence[str]) -> str:
    """The first three of many names, for a sentence."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def counted(problems: Mapping[str, Sequence[str]]) -> str:
    """How many names have each problem, and some of them; empty if none has any.

    >>> counted({"missing": ["a", "b", "c", "d"], "unexpected": []})
    '4 missing (a, b, c, ...)'
    """
    return "; ".join(f"{len(names)} {what} ({some(names)})" for what, names in problems.items() if names)


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """One sentence for a name that is not among ``known``, with the nearest ones first.

    >>> unknown("sampler", "eular", ["ddim", "euler"])
    "unknown sampler 'eular'; did you mean 'euler'? Known: ddim, euler."
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {guess}Known: {', '.join(names)}."
