"""Interface of a check: what it yields, and the registry of checks in causal order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ldm.image_output import Images

if TYPE_CHECKING:
    from ldm.diagnosis.opened_run import OpenedRun


class Topic(IntEnum):
    """Parts of a run in causal order: a fault of one makes the measurements of all later ones meaningless."""

    DATA = 1
    WEIGHTS = 2
    FIRST_STAGE = 3
    LATENTS = 4
    TEXT = 5
    OBJECTIVE = 6
    OPTIMIZATION = 7
    EMA = 8
    CONDITIONING = 9
    SAMPLING = 10


LEAST_SIDE = 64
"""Height in pixels to which smaller images are enlarged."""


@dataclass(frozen=True)
class Finding:
    """A fault that a check has found.

    Attributes:
        cause: identifier, such as ``captions_shuffled``; those of all checks are listed in docs/diagnose.md.
        problem: clause that says what is wrong.
        evidence: clause with the measured numbers.
        key: config field to change.
        remedy: what to do, as an imperative clause.
        certain: False for an observation that may be harmless; only certain findings become the verdict.
    """

    cause: str
    problem: str
    evidence: str
    key: str
    remedy: str
    certain: bool = True

    def __str__(self) -> str:
        return f"{self.problem} ({self.evidence}); {self.remedy} ({self.key})."


@dataclass(frozen=True)
class Measured:
    """A clause with measured numbers, for the table of checks."""

    text: str


@dataclass(frozen=True)
class Figure:
    """An image for the page, with its caption."""

    caption: str
    image: Image.Image

    @classmethod
    def of(cls, caption: str, images: Tensor, columns: int) -> Figure:
        """Return a grid of images ``[n c h w]`` in [-1, 1]; small ones are enlarged."""
        scale = max(1, LEAST_SIDE // images.shape[-2])
        return cls(caption, Images.of((images.clamp(-1, 1) + 1) / 2).grid(columns=columns, scale=scale))


Item = Finding | Measured | Figure
"""Result that a check yields."""


class Clock:
    """Time that a check may take.

    Args:
        seconds: until it is expired.
    """

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Remaining seconds, at least 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def expired(self) -> bool:
        return self.left == 0


@dataclass(frozen=True)
class Check:
    """A registered check.

    Attributes:
        topic: what it examines.
        title: noun phrase for the progress bar and the page.
        weight: share of the time that it may take, relative to the other checks.
        run: the generator; a check that does not apply to a run yields nothing.
        stages: stages of which one must have weights.
    """

    topic: Topic
    title: str
    weight: float
    run: Callable[[OpenedRun, Clock], Iterator[Item]]
    stages: tuple[str, ...]


CHECKS: list[Check] = []
"""All checks; :func:`checks_in_order` sorts them."""


def check(
    topic: Topic, title: str, weight: float = 1.0, stages: tuple[str, ...] = ()
) -> Callable[[Callable[[OpenedRun, Clock], Iterator[Item]]], Callable[[OpenedRun, Clock], Iterator[Item]]]:
    """Register a generator as a :class:`Check`."""

    def register(
        function: Callable[[OpenedRun, Clock], Iterator[Item]],
    ) -> Callable[[OpenedRun, Clock], Iterator[Item]]:
        CHECKS.append(Check(topic, title, weight, function, stages))
        return function

    return register


def checks_in_order() -> list[Check]:
    """Return all checks by topic, those of one topic by the names of their files."""
    from ldm.diagnosis import checks

    assert checks is not None  # importing the package registers them
    return sorted(CHECKS, key=lambda each: (each.topic, each.run.__module__))
