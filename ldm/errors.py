"""Errors that a user can cause. Each message is one sentence: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module


class LdmError(ValueError):
    """Base of the errors that a user can cause; commands print only the message and exit with code 2."""


class ConfigError(LdmError):
    """Invalid configuration: unknown key, wrong type, impossible combination."""


class PathError(LdmError):
    """Path with an environment variable that is not set, or with the home folder of a user that does not exist."""


class DataError(LdmError):
    """Images, captions or shards that are missing or unreadable."""


class MissingCaptionsError(DataError):
    """Data without the captions that something needs."""


class StorageError(DataError):
    """Shard that cannot be read at all, as opposed to one sample of it that is broken: missing, replaced, or out of reach."""


class CheckpointError(LdmError):
    """File of weights that is missing, broken, or does not fit its purpose.

    ``details`` lists everything where the message names only a few.
    """

    def __init__(self, message: str, details: Iterable[str] = ()):
        super().__init__(message)
        self.details = tuple(details)


class SamplingError(LdmError):
    """Invalid request to the pipeline: prompt, size, sampler, noise levels."""


class ConditionError(SamplingError):
    """Condition of one image of a batch, which the model does not support.

    Args:
        message: sentence about image ``row``, or about the batch if that is None.
        row: number of the image in the batch.
        problem: the sentence without its subject, to name the image otherwise.
    """

    def __init__(self, message: str, row: int | None = None, problem: str = ""):
        super().__init__(message)
        self.row, self.problem = row, problem

    @classmethod
    def of(cls, row: int, problem: str) -> ConditionError:
        """Return the error for what is wrong with image ``row``, such as ``"has 9 boxes, but ..."``."""
        return cls(f"image {row} {problem}.", row, problem)


class TrainingError(LdmError):
    """Training that cannot start or continue: missing predecessor, loss that is not finite."""


class Interrupted(TrainingError):
    """Training that a signal of the system stopped and the same command resumes; commands exit with code 75 (``EX_TEMPFAIL``)."""


class DivergedError(TrainingError):
    """Training whose loss, gradients or weights are not finite."""


class MissingExtraError(LdmError):
    """Missing optional dependency."""


def missing_extra(package: str, needed_for: str, extra: str) -> MissingExtraError:
    """Return the error for a missing optional dependency, naming the extra that installs it."""
    return MissingExtraError(f"{needed_for} needs the package {package!r}; install it with pip install 'ldm[{extra}]'.")


def require_package(module: str, needed_for: str, extra: str) -> None:
    """Check that an optional dependency can be imported, before the work that needs it.

    Raises:
        MissingExtraError: it is not installed; see :func:`missing_extra`.
    """
    try:
        import_module(module)
    except ImportError:
        raise missing_extra(module, needed_for, extra) from None


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, of bounded length, for use in a message."""
    line = str(error).strip().split("\n")[0].rstrip(".")
    return line if len(line) <= 500 else f"{line[:500]}..."


def warn(message: str) -> None:
    """Warn at the line outside of ldm that led here; Python shows a message once for each such line."""
    level, frame = 1, sys._getframe()
    within = ("ldm", "contextlib")  # decorated functions are called by contextlib
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in within:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def some(names: Sequence[str]) -> str:
    """Return the first three of many names, for a sentence."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def counted(problems: Mapping[str, Sequence[str]]) -> str:
    """Summarise how many names have each problem, with some of them; empty if there are none.

    >>> counted({"missing": ["a", "b", "c", "d"], "unexpected": []})
    '4 missing (a, b, c, ...)'
    """
    return "; ".join(f"{len(names)} {what} ({some(names)})" for what, names in problems.items() if names)


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Return a sentence for a name that is not among ``known``, with the nearest known one.

    >>> unknown("sampler", "eular", ["ddim", "euler"])
    "unknown sampler 'eular'; did you mean 'euler'? Known: ddim, euler."
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {guess}Known: {', '.join(names) or 'none'}."
