"""Conditioning: whether the denoiser uses the conditions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.pool import LEVELS, errors
from ldm.diagnosis.statistics import SIGNIFICANT, paired

NO_EFFECT = 0.01
"""Share of the error below which the effect of the conditions is none.

Conditions say most at high noise, where even those of large models explain a few percent of the error.
"""

MUCH_DROPOUT = 0.8
"""Rate of dropped conditions above which guidance is trained at the expense of the conditions; 0.1 is usual."""


@check(Topic.CONDITIONING, "error with true against other conditions", weight=2, stages=("denoiser",))
def captions_used(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare the error with the true conditions and with those of other images, at each noise level.

    The same samples and noise are used for both. The conditions are ignored if at every noise level the effect, with
    its uncertainty, is below :data:`NO_EFFECT` of the error; an effect that is merely uncertain is no fault.
    """
    keys = run.config.conditioner.input_keys
    pool = run.pool("train")
    if not keys or not pool.conditions:
        return
    other, changed = pool.mismatched()
    if len(changed) < 16:
        return
    true = errors(run.averaged, pool.take(changed), Clock(clock.left / 2))
    false = errors(run.averaged, other.take(changed), Clock(clock.left / 2))
    n = min(len(true), len(false))
    by_level = [paired(false[:n, i], true[:n, i]) for i in range(true.shape[1])]
    effects = {
        f"{position:g}": (each.first - each.second, each.error, each.second)
        for position, each in zip(LEVELS, by_level, strict=True)
    }
    text = ", ".join(f"{name}: {100 * effect / mean:+.1f} %" for name, (effect, _, mean) in effects.items())
    text = f"error with other {' and '.join(keys)} by position in the schedule: {text}"
    yield Measured(text)
    dropout = _dropout(run.config.conditioner)
    ignored = all(effect + SIGNIFICANT * error < NO_EFFECT * mean for effect, error, mean in effects.values())
    used = any(each.is_greater for each in by_level)
    if dropout > MUCH_DROPOUT:
        yield Finding(
            "conditioning_dropped",
            f"the conditions are dropped in {dropout:.0%} of the training examples",
            text,
            "denoiser.conditioner.dropout",
            "set it to 0.1",
        )
    elif ignored:
        yield Finding(
            "conditioning_ignored",
            "the denoiser ignores its conditions",
            text,
            "denoiser.conditioner",
            "check that the conditions differ and that the text encoder is trained, and train longer at high noise levels "
            "(denoiser.loss.noise_level_sampler)",
        )
    elif not used:
        yield Finding(
            "conditioning_weak",
            "no effect of the conditions is visible yet",
            text,
            "denoiser.train.max_steps",
            "train longer",
            certain=False,
        )


def _dropout(config: Any) -> float:
    """Return the rate at which a conditioner drops its condition; of several conditioners the lowest."""
    parts = getattr(config, "parts", {}).values() or [config]
    return min(float(getattr(each, "dropout", 0.0)) for each in parts)
