"""Prompts: blended, scheduled and weighted ones, and the texts that they stand for at each sampling step.

The weighted syntax is that of :mod:`ldm.prompt_syntax`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ldm import prompt_syntax
from ldm.checks import plain
from ldm.errors import SamplingError, warn
from ldm.prompt_syntax import LoRATag, Piece, escape, parse

__all__ = ["Blend", "LoRATag", "Piece", "Prompt", "PromptOptions", "Scheduled", "WeightedPrompt", "escape", "parse"]

SYNTAXES = ("plain", "weighted")
LONG_PROMPTS = ("chunks", "cut")


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
        breaks: positions in the text at which a new chunk begins.
        clip_skip: number of last layers of the text encoder that the context leaves out.
    """

    weights: tuple[float, ...]
    cut: bool
    breaks: tuple[int, ...]
    clip_skip: int

    def __new__(
        cls,
        text: str,
        weights: Sequence[float] = (),
        cut: bool = False,
        breaks: Sequence[int] = (),
        clip_skip: int = 0,
    ) -> WeightedPrompt:
        self = super().__new__(cls, text)
        self.weights, self.cut, self.breaks, self.clip_skip = tuple(weights), cut, tuple(breaks), clip_skip
        return self

    @property
    def key(self) -> tuple[object, ...]:
        """All that the encoded text depends on; two strings are equal if their characters are."""
        return str(self), self.weights, self.cut, self.breaks, self.clip_skip


@dataclass(frozen=True)
class PromptOptions:
    """Options for parsing prompts; fields as in :class:`ldm.sampling_settings.SamplingSettings`, which checks them."""

    prompt_syntax: str = "plain"
    long_prompts: str = "chunks"
    clip_skip: int | None = None

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
        return {_step(share, steps) for piece in parse(prompt, steps) for share in (piece.since, piece.until)}

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

    def composition(self, prompt: Prompt | None) -> list[tuple[float, Prompt | None]]:
        """Return the prompts that ``prompt`` joins by AND, with their weights.

        Raises:
            SamplingError: the prompt has a syntax error.
        """
        if not isinstance(prompt, str) or self.prompt_syntax == "plain":
            return [(1.0, prompt)]
        return [*prompt_syntax.composition(prompt)]

    def lora_tags(self, prompt: Prompt | None) -> list[LoRATag]:
        """Return the LoRAs that a prompt names.

        Raises:
            SamplingError: a scale is not a number, or out of range.
        """
        texts = () if self.prompt_syntax == "plain" else _texts(prompt)
        return [tag for text in texts for tag in prompt_syntax.lora_tags(text)]

    def check(self, prompts: Sequence[Prompt | None], negative: bool = False) -> None:
        """Raise a SamplingError for a syntax error, and warn of words that have a meaning in another syntax only.

        Args:
            prompts: prompts of a call.
            negative: whether they are its negative prompts.
        """
        for prompt in dict.fromkeys(prompts):
            composable = not negative and isinstance(prompt, str)
            for _, part in self.composition(prompt) if composable else [(1.0, prompt)]:
                self.changes(part, steps=1)
            self.lora_tags(prompt)
            for text in _texts(prompt):
                for word, advice in prompt_syntax.foreign_words(text, self.prompt_syntax, negative, composable).items():
                    warn(f"{word!r} in a {'negative ' * negative}prompt has no effect of its own here; {advice}.")

    def _text(self, prompt: str, step: int, steps: int) -> WeightedPrompt:
        cut, skipped = self.long_prompts == "cut", self.clip_skip or 0
        if self.prompt_syntax == "plain":
            return WeightedPrompt(prompt, cut=cut, clip_skip=skipped)
        pieces = parse(prompt, steps)
        active = [piece for piece in pieces if _step(piece.since, steps) <= step < _step(piece.until, steps)]
        text, breaks = "", list[int]()
        for piece in active:
            text += piece.text
            breaks += [] if piece.text else [len(text)]
        weights = [piece.weight for piece in active for _ in piece.text]
        return WeightedPrompt(
            text,
            weights if any(weight != 1 for weight in weights) else (),
            cut,
            [place for place in breaks if text[place:].strip()],
            skipped,
        )


def _texts(prompt: Prompt | None) -> Iterator[str]:
    """Yield all strings of a prompt."""
    if isinstance(prompt, Blend | Scheduled):
        yield from _texts(prompt.first)
        yield from _texts(prompt.second)
    elif prompt is not None:
        yield prompt


def _step(share: float, steps: int) -> int:
    return round(share * steps)
