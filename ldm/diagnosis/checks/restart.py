"""Optimization: whether a new network is better after a few steps than the run is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.pool import errors
from ldm.diagnosis.short_training import restarted, train
from ldm.diagnosis.statistics import paired
from ldm.diagnosis.variants import Variant, variants

STEPS = 40
"""Largest number of steps of each new training."""

LEAST = 10
"""Steps from which a new training is worth the time."""

SAME = Variant("", "", "", "", "the same settings", {})


@check(Topic.OPTIMIZATION, "a new network is not better", weight=8, stages=("denoiser",))
def restart(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Train new networks for a few steps, with the settings of the run and with one changed at a time.

    The run has trained for many more steps. A new network that has nevertheless a significantly smaller error on the same samples
    with the same noise proves that the steps of the run were in vain, and the setting that was changed is the reason. A run with
    hardly more steps than the new networks has only just begun, and its settings cannot be judged.

    The current weights are judged, not their average.
    """
    if run.experiment.denoiser.train.init is not None:  # a new network does not have those weights
        return
    weights, config = run.stages["denoiser"], run.experiment.denoiser.train
    pool = run.pool("train")
    own = run.errors(Clock(clock.left / 10), averaged=False).mean(1)
    error = f"an error of {float(own.mean()):.3f} on the scale from 0 to 1 after {weights.steps} steps"
    if weights.steps <= 2 * STEPS:
        yield Finding(
            "training_too_short",
            "the training has only just begun",
            error,
            "denoiser.train.max_steps",
            "train for thousands of steps",
        )
        return
    start, left = time.monotonic(), [SAME, *variants(config)]
    train(run, restarted(run), config, pool, 2, clock)  # to learn how long a step takes
    seconds = (time.monotonic() - start) / 2
    steps = min(STEPS, int(0.7 * clock.left / len(left) / seconds))
    if steps < LEAST:
        yield Measured(f"a step takes {seconds:.1f} s, so that there is no time for this")
        return
    tried: dict[Variant, torch.Tensor] = {}
    for variant in left:
        model = restarted(run)
        train(run, model, replace(config, **variant.changes), pool, steps, Clock(clock.left))
        tried[variant] = errors(model, pool, Clock(clock.left / 10)).mean(1)
    results = (f"{float(each.mean()):.3f} with {name.description}" for name, each in tried.items())
    text = f"{error}; new networks after {steps} steps: {'; '.join(results)}"
    yield Measured(text)
    better = {name: float(each.mean()) for name, each in tried.items() if _is_better(each, own)}
    if not better:
        return
    best = min(better, key=lambda name: better[name])
    if best is not SAME and _is_better(tried[best], tried[SAME]):
        yield Finding(best.cause, best.problem, text, best.key, best.remedy)
    else:
        yield Finding(
            "training_diverged",
            "the weights are worse than those of a network that has just begun to train",
            text,
            "denoiser.train.learning_rate",
            "go back to an earlier checkpoint, such as best.ckpt, and resume with a lower learning rate",
        )


def _is_better(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether the first errors are significantly smaller than the second ones of the same samples."""
    n = min(len(first), len(second))
    return bool(first.isfinite().all()) and (
        not second[:n].isfinite().all() or paired(second[:n], first[:n]).is_greater
    )
