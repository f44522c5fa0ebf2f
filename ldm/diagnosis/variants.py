"""Changes of one training setting at a time, each of which would be the remedy of one fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.training.config import TrainConfig

FACTOR = 30.0
"""Factor between the learning rates that are tried.

Learning rates within a factor of three of the best one train nearly equally well; the next to be tried is beyond that of any
rate within ten times of it.
"""


@dataclass(frozen=True)
class Variant:
    """A changed setting, and the fault that it would be the remedy of.

    Attributes:
        cause, problem, key, remedy: as of a finding.
        description: phrase for the change.
        changes: fields of the training config.
    """

    cause: str
    problem: str
    key: str
    remedy: str
    description: str
    changes: Mapping[str, Any] = field(hash=False)


def variants(config: TrainConfig) -> list[Variant]:
    """Return the settings to try: learning rates :data:`FACTOR` times as high and as low, or limits relaxed that are unusual."""
    found = []
    if config.gradient_clip is not None and config.gradient_clip < 1e-2:
        found.append(
            Variant(
                "gradient_clip_too_low",
                "the gradients are clipped to nothing",
                "denoiser.train.gradient_clip",
                "set it to 1.0",
                "gradients clipped at 1",
                {"gradient_clip": 1.0},
            )
        )
    if config.weight_decay > 0.2:
        found.append(
            Variant(
                "weight_decay_too_high",
                "the weight decay pulls all weights to zero",
                "denoiser.train.weight_decay",
                "set it to 0.01",
                "weight decay 0.01",
                {"weight_decay": 0.01},
            )
        )
    if found:  # with these, no learning rate can be judged
        return found
    for factor in (1 / FACTOR, FACTOR):
        high, rate = factor < 1, config.learning_rate * factor
        found.append(
            Variant(
                "learning_rate_too_high" if high else "learning_rate_too_low",
                f"the learning rate is too {'high' if high else 'low'}",
                "denoiser.train.learning_rate",
                f"try {rate:.2g}",
                f"a learning rate of {rate:.2g}",
                {"learning_rate": rate},
            )
        )
    return found
