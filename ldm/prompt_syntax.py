r"""The weighted prompt syntax, as users of Automatic1111's web UI know it.

| written                  | meaning                                                               |
|--------------------------|-----------------------------------------------------------------------|
| ``(word:1.3)``           | weight 1.3                                                            |
| ``(word)``               | weight 1.1                                                            |
| ``[word]``               | weight 1 / 1.1                                                        |
| ``[cat:dog:0.4]``        | cat in the first 40 % of the steps, then dog; either may be empty     |
| ``[dog:0.4]``            | nothing in the first 40 % of the steps, then dog                      |
| ``[cat|dog]``            | cat and dog in turn, a step each; any number of alternatives          |
| ``a BREAK b``            | b begins a new chunk of the text encoder's context                    |
| ``a AND b :0.5``         | two prompts, whose predictions are added with weights 1 and 0.5       |
| ``<lora:name:0.8>``      | the LoRA ``name`` at scale 0.8                                        |
| ``<lora:name:0.8:0.5>``  | the LoRA at scale 0.8 in the text encoders, 0.5 in the denoiser       |
| ``\(``                   | the character, also of ``)``, ``[``, ``]``, ``:``, ``|``, ``<``, ``\``|
| ``\AND``, ``\BREAK``     | the word                                                              |

Groups nest, and their weights multiply. A colon that no number follows is a character.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from ldm.errors import SamplingError

EMPHASIS = 1.1
"""Weight of a group without a number."""

MAX_WEIGHT = 1000.0
"""Largest absolute weight; far beyond any use, and safe in half precision."""

LORA_KINDS = ("lora", "lyco")
"""Beginnings of the tags that name a LoRA."""

_PAIRS = {"(": ")", "[": "]"}
_WORDS = r"\b(?:AND|BREAK)\b"
_TAG = r"<\w+:[^<>]+>"
_SPECIAL = r"[()\[\]:|<\\]"
_TOKEN = re.compile(rf"\\(?:{_SPECIAL}|{_WORDS})|[()\[\]:|\\]|{_TAG}|{_WORDS}|(?:(?!{_TAG}|{_WORDS})[^()\[\]:|\\])+")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")
_WEIGHTED_PART = re.compile(rf"(.*?)(?:\s*(?<!\\):({_NUMBER.pattern}))?\s*", re.DOTALL)

_FOREIGN = (
    r"\{[^{}]*\}",
    r"(?:\)|\w{2,})(?:\+{2,}|-{2,})(?!\w)",
    r"\)\+(?!\+)",
    r"\([^()]*:\s*\d+,\d+\s*\)",
    r"\uff08[^\uff08\uff09]*[:\uff1a]\s*[\d.]+\s*\uff09",
)
"""Patterns of weights in the syntaxes of NovelAI and compel, with a decimal comma, and in full-width characters."""

_OPEN_TAG = rf"<(?:{'|'.join(LORA_KINDS)}):[^<>]*(?=<|$)"
"""Pattern of a tag that is not closed."""

_OF_WEIGHTED = (_TAG, _WORDS, r"\[[^\[\]]*(?:\||:\s*[\d.]+\s*\])[^\[\]]*\]?", r"\([^()]*:\s*[\d.]+\s*\)")
"""Patterns of what has a meaning in the weighted syntax only."""


class Piece(NamedTuple):
    """A part of a weighted prompt, active in the steps from share ``since`` to share ``until``.

    An empty ``text`` begins a new chunk (BREAK).
    """

    text: str
    weight: float = 1.0
    since: float = 0.0
    until: float = 1.0

    def within(self, since: float, until: float) -> Piece:
        """Return the piece, active in these steps only."""
        return self._replace(since=max(self.since, since), until=min(self.until, until))


class LoRATag(NamedTuple):
    """A LoRA that a prompt names, with its scales in the text encoders and in the denoiser."""

    name: str
    text_scale: float
    scale: float
    written: str


def parse(prompt: str, steps: int = 1) -> list[Piece]:
    """Parse a weighted prompt into its pieces, in order; neighbours differ in weight or steps.

    Tags are left out; AND is a word, since :func:`composition` splits at it.

    Args:
        prompt: the prompt.
        steps: number of sampling steps, by which alternatives take turns.

    Raises:
        SamplingError: an unbalanced bracket, a share of the steps outside of [0, 1], or a weight beyond MAX_WEIGHT.
    """
    return list(_parsed(prompt, steps))


@lru_cache(maxsize=256)
def _parsed(prompt: str, steps: int) -> tuple[Piece, ...]:
    groups = [_Group("", 0)]
    for match in _TOKEN.finditer(prompt):
        token, place = match.group(), match.start() + 1
        if token in _PAIRS:
            groups.append(_Group(token, place))
        elif token in _PAIRS.values():
            group = groups.pop()
            if _PAIRS.get(group.bracket) != token:
                raise _unbalanced(prompt, token, place, "closes nothing; remove it")
            groups[-1].add(*group.pieces(prompt, steps))
        elif token == ":" and len(groups) > 1:
            groups[-1].options[-1].append([])
        elif token == "|" and groups[-1].bracket == "[":
            groups[-1].options.append([[]])
        elif token == "BREAK":
            groups[-1].add(Piece(""))
        elif not re.fullmatch(_TAG, token):
            groups[-1].add(Piece(token[1:] or token if token[0] == "\\" else token))
    if len(groups) > 1:
        raise _unbalanced(prompt, groups[-1].bracket, groups[-1].place, "is never closed; close it")
    pieces = groups[0].options[0][0]
    for piece in pieces:
        _check_weight(piece.weight, piece.text, prompt)
    return tuple(_merged(pieces))


def _merged(pieces: list[Piece]) -> Iterator[Piece]:
    """Join neighbours that differ in their text only."""
    for (is_text, *key), run in groupby(pieces, lambda piece: (bool(piece.text), *piece[1:])):
        if is_text:
            yield Piece("".join(piece.text for piece in run), *key)
        else:
            yield from run


def composition(prompt: str) -> list[tuple[float, str]]:
    """Split a prompt at AND, and return the parts with their weights; without AND, the prompt with the weight 1.

    Raises:
        SamplingError: an AND within brackets, or a weight beyond MAX_WEIGHT.
    """
    depth, ends = 0, [0]
    for match in _TOKEN.finditer(prompt):
        depth += (match.group() in _PAIRS) - (match.group() in _PAIRS.values())
        if match.group() == "AND":
            if depth > 0:
                raise SamplingError(
                    f"the AND at character {match.start() + 1} of the prompt {prompt!r} is within brackets; "
                    "put it outside of them, or write \\AND for the word."
                )
            ends += match.span()
    if len(ends) == 1:
        return [(1.0, prompt)]
    parts = []
    for start, end in zip(ends[::2], [*ends[1::2], len(prompt)], strict=True):
        part = _WEIGHTED_PART.fullmatch(prompt[start:end])
        assert part is not None, "the pattern matches any text"
        weight = float(part[2] or 1.0)
        _check_weight(weight, part[1].strip(), prompt)
        parts.append((weight, part[1]))
    return parts


def tags(prompt: str) -> list[str]:
    """Return the tags of a prompt, such as ``<lora:name:0.8>``, in order."""
    return [token for token in _TOKEN.findall(prompt) if re.fullmatch(_TAG, token)]


def lora_tags(prompt: str) -> list[LoRATag]:
    """Return the LoRAs that a prompt names.

    Raises:
        SamplingError: a tag's scale is not a number, or out of range.
    """
    found = []
    for tag in tags(prompt):
        kind, name, *scales = tag[1:-1].split(":")
        if kind not in LORA_KINDS:
            continue
        if len(scales) > 2 or not all(_NUMBER.fullmatch(scale) for scale in scales):
            raise SamplingError(f"the scale in {tag} is not a number; write <{kind}:name:0.8>.")
        given = [float(scale) for scale in scales] or [1.0]
        for scale in given:
            _check_weight(scale, tag, prompt)
        found.append(LoRATag(name.strip(), given[0], given[-1], tag))
    return found


def foreign_words(prompt: str, syntax: str, negative: bool = False, composable: bool = True) -> dict[str, str]:
    """Return the words of a prompt that have a meaning in another syntax or place only, each with what to do.

    Args:
        prompt: the prompt.
        syntax: ``"plain"`` or ``"weighted"``.
        negative: whether it is a negative prompt, in which LoRAs cannot be named.
        composable: whether AND may join prompts in it.
    """
    found = dict.fromkeys(_found(_FOREIGN, prompt), "write (word:1.1) in the weighted syntax for a weight")
    if syntax == "plain":
        marks = _found(_OF_WEIGHTED, "" if prompt.isupper() else prompt)
        return found | dict.fromkeys(marks, "set prompt_syntax to 'weighted' for that")
    found |= dict.fromkeys(_found((_OPEN_TAG,), prompt), "close the tag with >")
    for tag in tags(prompt):
        if not tag.startswith(tuple(f"<{kind}:" for kind in LORA_KINDS)):
            found[tag] = f"of tags, only <{LORA_KINDS[0]}:name:0.8> is supported"
        elif negative:
            found[tag] = "name LoRAs in the prompt"
    if not composable and "AND" in _TOKEN.findall(prompt):
        found["AND"] = "join prompts by AND in a prompt that is a string"
    return found


def _found(patterns: tuple[str, ...], prompt: str) -> list[str]:
    return [match.group() for pattern in patterns for match in re.finditer(rf"(?<!\\){pattern}", prompt)]


def escape(text: str) -> str:
    r"""Escape ``text`` for the weighted syntax: put a ``\`` before each special character, AND and BREAK."""
    return re.sub(rf"{_SPECIAL}|{_WORDS}", r"\\\g<0>", text)


@dataclass
class _Group:
    """Contents of a bracket: alternatives, each split at its colons; ``place`` is that of the bracket, counted from 1."""

    bracket: str
    place: int
    options: list[list[list[Piece]]] = field(default_factory=lambda: [[[]]])

    def add(self, *pieces: Piece) -> None:
        """Add pieces, except those that are active in no step."""
        self.options[-1][-1] += [piece for piece in pieces if piece.since < piece.until]

    def pieces(self, prompt: str, steps: int) -> list[Piece]:
        """Return its pieces when it is closed."""
        *parts, last = self.options[-1]
        number = _number(last) if parts else None
        if len(self.options) > 1:
            if number is not None:
                raise SamplingError(
                    f"the [ at character {self.place} of the prompt {prompt!r} has alternatives and the number {number:g}; "
                    "write [[a|b]:c:0.4] to change it after a share of the steps, or \\: for the colon."
                )
            return self._alternating(steps)
        if self.bracket == "(":
            parts, weight = (self.options[0], EMPHASIS) if number is None else (parts, number)
            return [piece._replace(weight=piece.weight * weight) for piece in _joined(parts)]
        if number is None or len(parts) > 2:
            return [piece._replace(weight=piece.weight / EMPHASIS) for piece in _joined(self.options[0])]
        if not 0 <= number <= 1:
            raise SamplingError(
                f"the [ at character {self.place} of the prompt {prompt!r} changes it after {number:g} of the steps; "
                "give a share from 0 to 1, or (word:weight) for a weight."
            )
        before, after = [[], *parts][-2:]
        return [piece.within(0, number) for piece in before] + [piece.within(number, 1) for piece in after]

    def _alternating(self, steps: int) -> list[Piece]:
        """Return the pieces of each alternative, active in every n-th step of n alternatives."""
        return [
            piece.within(turn / steps, (turn + 1) / steps)
            for first, option in enumerate(self.options)
            for turn in range(first, steps, len(self.options))
            for piece in _joined(option)
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


def _check_weight(weight: float, what: str, prompt: str) -> None:
    if abs(weight) > MAX_WEIGHT:
        raise SamplingError(
            f"the weight {weight:g} of {what!r} in the prompt {prompt!r} is out of range; "
            f"give one from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}."
        )


def _unbalanced(prompt: str, bracket: str, place: int, what: str) -> SamplingError:
    return SamplingError(
        f"the {bracket} at character {place} of the prompt {prompt!r} {what}, or write \\{bracket} for the character."
    )
