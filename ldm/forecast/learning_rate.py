"""Learning-rate range test: the rate rises from step to step until the loss does (Smith 2017, arXiv 1506.01186, section 3.3).

The rate rises exponentially, so that each factor has the same number of steps. The limit is the rate at which the smoothed loss
is lowest: beyond it steps do harm. A third of it is suggested, Smith's lower bound of a range of rates. With Adam and the noisy
loss of a denoiser, the limit is known to a factor of a few, so rates up to four times as high pass for usable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LOWEST, HIGHEST = 1e-6, 1.0
"""Range of the learning rates."""

SMOOTHING = 0.8
"""Decay of the averaged loss."""

DIVERGED = 3.0
"""Ratio of the averaged loss to its lowest value at which the test ends."""

FALL = 0.1
"""Share of the fall of the loss that is used in place of its lowest value where that is closer to 0; losses can be negative."""

SUGGESTED = 1 / 3
"""Suggested learning rate as a share of the limit."""

USABLE = (0.02, 4.0)
"""Range of usable learning rates as shares of the limit."""

LearningRate = Literal["auto", "config", "test"]
"""Learning rate that is taken: that of the config, that of the test, or that of the config if the test finds it usable."""


@dataclass(frozen=True)
class RangeTest:
    """Result of a range test.

    Attributes:
        rates: learning rates in the order of the steps.
        losses: averaged loss after each.
        limit: learning rate with the lowest averaged loss.
        diverged: True if the loss rose again, so that the limit is one.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    limit: float
    diverged: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RangeTest:
        """Return the test of the values of its fields, of which JSON has lists for tuples."""
        return cls(tuple(values["rates"]), tuple(values["losses"]), values["limit"], values["diverged"])

    @property
    def suggested(self) -> float:
        """Suggested peak learning rate, with one significant digit."""
        return float(f"{SUGGESTED * self.limit:.0e}")

    def is_usable(self, rate: float) -> bool:
        """Return True if a learning rate is in the range that the test finds usable."""
        low, high = (share * self.limit for share in USABLE)
        return low <= rate <= high

    def choose(self, rate: float, choice: LearningRate) -> float:
        """Return the learning rate to train with, where ``rate`` is that of the config, which a test without a limit keeps."""
        if not self.diverged or choice == "config" or (choice == "auto" and self.is_usable(rate)):
            return rate
        return self.suggested

    def describe(self, rate: float) -> str:
        """Return a sentence on the test and the learning rate of the config."""
        if not self.diverged:
            return (
                f"Learning rate: the loss did not rise up to {self.rates[-1]:.1g}, so the range test says little; the "
                f"config's {rate:g} is kept."
            )
        found = f"Learning rate: the loss of the range test is lowest at {self.limit:.1g}, which suggests {self.suggested:g}"
        if self.is_usable(rate):
            return f"{found}; the config's {rate:g} is in the usable range."
        problem = "too high" if rate > self.limit * USABLE[1] else "low"
        return f"{found}; the config's {rate:g} is {problem}."


def range_test(
    step: Callable[[float], float], steps: int, lowest: float = LOWEST, highest: float = HIGHEST
) -> RangeTest:
    """Run a range test.

    Args:
        step: takes an optimizer step at a learning rate and returns the loss before it.
        steps: number of steps from the lowest to the highest rate.
        lowest, highest: range of the rates.
    """
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    for number in range(steps):
        rate = lowest * (highest / lowest) ** (number / max(1, steps - 1))
        loss = step(rate)
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averaged = average / (1 - SMOOTHING ** (number + 1))
        if not math.isfinite(averaged):
            averaged = math.inf
        rates.append(rate)
        losses.append(averaged)
        if averaged > highest_loss(losses):
            break
    best = min(range(len(losses)), key=losses.__getitem__)
    # The average lags behind the loss by its time constant.
    lag = round(SMOOTHING / (1 - SMOOTHING))
    limit = rates[max(0, best - lag)] if best < len(losses) - 1 else rates[best]
    return RangeTest(tuple(rates), tuple(losses), limit, losses[-1] > highest_loss(losses))


def highest_loss(losses: Sequence[float]) -> float:
    """Return the averaged loss above which the test ends: far above the lowest one."""
    low = min(losses)
    return low + (DIVERGED - 1) * max(abs(low), FALL * (losses[0] - low))
