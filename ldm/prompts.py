r"""Prompts: blended, scheduled and weighted ones, and the texts that they stand for at each sampling step.

The weighted syntax, as users of Automatic1111's web UI know it:

| written          | meaning                                                          |
|------------------|------------------------------------------------------------------|
| ``(word:1.3)``   | weight 1.3                                                       |
| ``(word)``       | weight 1.1                                                       |
| ``[word]``       | weight 1 / 1.1                                                   |
| ``[cat:dog:0.4]``| cat in the first 40 % of the steps, then dog; either may be empty |
| ``[dog:0.4]``    | nothing in the first 40 % of the steps, then dog                 |
| ``\(``           | the character, also of ``)``, ``[``, ``]``, ``:`` and ``\``      |

Groups nest, and their weights multiply. A colon that no number follows is a character.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from ldm.checks import plain
from ldm.errors import SamplingError

SYNTAXES = ("plain", "weighted")
LONG_PROMPTS = ("chunks", "cut")

EMPHASIS = 1.1
"""Weight of a group without a number."""

MAX_WEIGHT = 1000.0
"""Largest absolute weight; far beyond any use, and safe in half precision."""

_PAIRS = {"(": ")", "[": "]"}
_TOKEN = re.compile(r"\\[()\[\]:\\]|[()\[\]:\\]|[^()\[\]:\\]+")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")


@dataclass(frozen=True)
class _Pair:
    first: Prompt
    second: Prompt
    share: float

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for prompt in (self.first, self.second):
            if not isinstance(prompt, Prompt):
                raise SamplingError(f"{kind} is given {prompt!r}, which is no prompt; give two prompts and a share.")
        object.__setattr__(self, "share", plain(self.share))
        if not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise SamplingError(f"the share of {kind} is {self.share!r}; it must be a number from 0 to 1.")


class Blend(_Pair):
    """A mixture of two prompts: their conditionings, ``1 - share`` of the first plus ``share`` of the second.

    Raises:
        SamplingError: a share outside of [0, 1], or an object that is not a prompt.
    """


class Scheduled(_Pair):
    """A change of prompts: the first in the first ``share`` of the steps, then the second.

    Raises:
        SamplingError: a share outside of [0, 1], or an object that is not a prompt.
    """


Prompt = str | Blend | Scheduled


class WeightedPrompt(str):
    """Input of a text conditioner: a string with weights and a rule for long texts.

    Attributes:
        weights: weight of each character; empty: 1 everywhere.
        cut: whether to cut the text at the length of the text encoder's context; else it is encoded in chunks.
    """

    weights: tuple[float, ...]
    cut: bool

    def __new__(cls, text: str, weights: Sequence[float] = (), cut: bool = False) -> WeightedPrompt:
        self = super().__new__(cls, text)
        self.weights, self.cut = tuple(weights), cut
        return self


@dataclass(frozen=True)
class PromptOptions:
    """Options for parsing prompts; fields as in :class:`ldm.sampling_settings.SamplingSettings`, which checks them."""

    prompt_syntax: str = "plain"
    long_prompts: str = "chunks"

    def changes(self, prompt: Prompt | None, steps: int) -> set[int]:
        """Return the steps, from 0 to ``steps``, at which the text of the prompt may change.

        Raises:
            SamplingError: the prompt has a syntax error.
        """
        if isinstance(prompt, Blend | Scheduled):
            inner = self.changes(prompt.first, steps) | self.changes(prompt.second, steps)
            return inner | {_step(prompt.share, steps)} if isinstance(prompt, Scheduled) else inner
        if prompt is None or self.prompt_syntax == "plain":
            return set()
        return {_step(share, steps) for piece in parse(prompt) for share in (piece.since, piece.until)}

    def at(self, prompt: Prompt | None, step: int, steps: int) -> list[tuple[float, WeightedPrompt | None]]:
        """Return the texts of the prompt in a step, from 0 to ``steps - 1``, with their shares, which add up to 1.

        Raises:
            SamplingError: the prompt has a syntax error.
        """
        if isinstance(prompt, Scheduled):
            return self.at(prompt.first if step < _step(prompt.share, steps) else prompt.second, step, steps)
        if isinstance(prompt, Blend):
            ends = ((1 - prompt.share, prompt.first), (prompt.share, prompt.second))
            return [(share * part, text) for share, end in ends if share for part, text in self.at(end, step, steps)]
        return [(1.0, None if prompt is None else self._text(prompt, step, steps))]

    def _text(self, prompt: str, step: int, steps: int) -> WeightedPrompt:
        cut = self.long_prompts == "cut"
        if self.prompt_syntax == "plain":
            return WeightedPrompt(prompt, cut=cut)
        active = [piece for piece in parse(prompt) if _step(piece.since, steps) <= step < _step(piece.until, steps)]
        weights = [piece.weight for piece in active for _ in piece.text]
        return WeightedPrompt(
            "".join(piece.text for piece in active), weights if any(w != 1 for w in weights) else (), cut
        )


class Piece(NamedTuple):
    """A part of a weighted prompt, active in the steps from share ``since`` to share ``until``."""

    text: str
    weight: float = 1.0
    since: float = 0.0
    until: float = 1.0


def parse(prompt: str) -> list[Piece]:
    """Parse a weighted prompt into its pieces, in order; neighbours differ in weight or steps.

    Raises:
        SamplingError: an unbalanced bracket, a share of the steps outside of [0, 1], or a weight beyond MAX_WEIGHT.
    """
    groups = [_Group("", 0)]
    for match in _TOKEN.finditer(prompt):
        token, place = match.group(), match.start() + 1
        if token in _PAIRS:
            groups.append(_Group(token, place))
        elif token in _PAIRS.values():
            group = groups.pop()
            if _PAIRS.get(group.bracket) != token:
                raise _unbalanced(prompt, token, place, "closes nothing; remove it")
            groups[-1].fields[-1] += group.pieces(prompt)
        elif token == ":" and len(groups) > 1:
            groups[-1].fields.append([])
        else:
            groups[-1].fields[-1].append(Piece(token[-1] if token[0] == "\\" else token))
    if len(groups) > 1:
        raise _unbalanced(prompt, groups[-1].bracket, groups[-1].place, "is never closed; close it")
    active = [piece for piece in groups[0].fields[0] if piece.text and piece.since < piece.until]
    for piece in active:
        if abs(piece.weight) > MAX_WEIGHT:
            raise SamplingError(
                f"the weight {piece.weight:g} of {piece.text!r} in the prompt {prompt!r} is out of range; "
                f"give one from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}."
            )
    return [Piece("".join(piece.text for piece in run), *key) for key, run in groupby(active, lambda piece: piece[1:])]


def escape(text: str) -> str:
    r"""Escape ``text`` for the weighted syntax: put a ``\`` before each of its brackets, colons and ``\``."""
    return re.sub(r"[()\[\]:\\]", r"\\\g<0>", text)


@dataclass
class _Group:
    """Contents of a bracket, split at its colons; ``place`` is the position of the bracket, counted from 1."""

    bracket: str
    place: int
    fields: list[list[Piece]] = field(default_factory=lambda: [[]])

    def pieces(self, prompt: str) -> list[Piece]:
        """Return its pieces when it is closed."""
        *parts, last = self.fields
        number = _number(last) if parts else None
        if self.bracket == "(":
            parts, weight = (self.fields, EMPHASIS) if number is None else (parts, number)
            return [piece._replace(weight=piece.weight * weight) for piece in _joined(parts)]
        if number is None or len(parts) > 2:
            return [piece._replace(weight=piece.weight / EMPHASIS) for piece in _joined(self.fields)]
        if not 0 <= number <= 1:
            raise SamplingError(
                f"the [ at character {self.place} of the prompt {prompt!r} changes it after {number:g} of the steps; "
                "give a share from 0 to 1, or (word:weight) for a weight."
            )
        before, after = [[], *parts][-2:]
        return [piece._replace(until=min(piece.until, number)) for piece in before] + [
            piece._replace(since=max(piece.since, number)) for piece in after
        ]


def _number(pieces: list[Piece]) -> float | None:
    """Return the number that the pieces spell, or None."""
    text = "".join(piece.text for piece in pieces)
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def _joined(parts: list[list[Piece]]) -> list[Piece]:
    """Join the parts with colons."""
    first, *others = parts
    return first + [piece for part in others for piece in (Piece(":"), *part)]


def _step(share: float, steps: int) -> int:
    return round(share * steps)


def _unbalanced(prompt: str, bracket: str, place: int, what: str) -> SamplingError:
    return SamplingError(
        f"the {bracket} at character {place} of the prompt {prompt!r} {what}, or write \\{bracket} for the character."
    )
