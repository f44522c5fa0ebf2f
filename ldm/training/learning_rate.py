"""Learning-rate schedules after warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ldm.config import Kind, config_field
from ldm.errors import ConfigError

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}
"""Decays from 1 to 0 as functions of x in [0, 1]; sqrt is the best cooldown of Hägele et al. 2024, arXiv 2405.18392."""


class LearningRateDecay(Kind):
    """Family of the learning-rate schedules after warm-up."""

    def factor(self, done: float) -> float:
        """Return the factor on the learning rate, in [0, 1], after the share ``done`` in [0, 1] of the steps after warm-up."""
        raise NotImplementedError

    @property
    def stable_share(self) -> float | None:
        """Share of the steps after warm-up before a final decay; None if there is none."""
        return None


@dataclass(frozen=True)
class Constant(LearningRateDecay, kind="constant"):
    """The learning rate stays at its peak."""

    def factor(self, done: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(LearningRateDecay, kind="cosine"):
    """Half a period of a cosine, to 0 at max_steps (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)."""

    def factor(self, done: float) -> float:
        return SHAPES["cosine"](done)


@dataclass(frozen=True)
class Linear(LearningRateDecay, kind="linear"):
    """A straight line, to 0 at max_steps."""

    def factor(self, done: float) -> float:
        return SHAPES["linear"](done)


@dataclass(frozen=True)
class WSD(LearningRateDecay, kind="wsd"):
    """Warm-up, stable, decay: constant, then a short decay to 0 at max_steps (Hu et al. 2024, MiniCPM, arXiv 2404.06395, eq. 1).

    If ``max_steps`` is raised, a training is resumed from the stable phase, and its result is that of one with so many steps.
    """

    share: float = config_field(0.2, "share of the steps after warm-up in which the learning rate decays")
    shape: Literal["linear", "sqrt", "cosine"] = config_field(
        "sqrt", "decay at the share x of these steps: linear = 1 - x, sqrt = 1 - sqrt(x), cosine = (1 + cos(pi x)) / 2"
    )

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}; it must be above 0 and at most 1.")

    @property
    def stable_share(self) -> float:
        return 1 - self.share

    def factor(self, done: float) -> float:
        return SHAPES[self.shape](max(0.0, (done - (1 - self.share)) / self.share))
