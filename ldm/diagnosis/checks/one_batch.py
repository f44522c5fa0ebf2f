"""Optimization: whether the loss of one batch falls when it alone is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.short_training import current, falls, train
from ldm.diagnosis.statistics import SIGNIFICANT
from ldm.diagnosis.variants import variants

STEPS = 30
"""Steps on the batch; any optimizer that works memorises a part of the noise of a batch in as many."""


@check(Topic.OPTIMIZATION, "the loss of one batch falls", weight=4, stages=("denoiser",))
def one_batch(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Train a copy of the current weights on one batch, always with the same noise, as the config says.

    If the loss does not fall, the training is repeated with one setting changed at a time; that with which it falls most is the
    cause. If it falls with none, the weights are beyond repair, and :mod:`ldm.diagnosis.checks.restart` finds what broke them.
    """
    config, pool = run.experiment.denoiser.train, run.pool("train")
    losses = train(run, current(run), config, pool, STEPS, clock, same_batch=True)
    z = falls(losses)
    text = (
        f"from {float(losses[0].mean()):.3g} to {float(losses[-1].mean()):.3g} in {len(losses)} steps at the learning rate "
        f"{config.learning_rate:g}, a fall by {z:.1f} standard errors"
    )
    yield Measured(text)
    if z > SIGNIFICANT or len(losses) < STEPS:
        return
    tried = {
        variant: train(run, current(run), replace(config, **variant.changes), pool, STEPS, clock, same_batch=True)
        for variant in variants(config)
    }
    working = {variant: _fall(each) for variant, each in tried.items() if falls(each) > SIGNIFICANT}
    if not working:
        yield Finding(
            "network_stuck",
            "the network does not learn one batch, with any setting that was tried",
            text,
            "denoiser.train",
            "train from new weights in another run_dir",
            certain=False,
        )
        return
    best = max(working, key=lambda variant: working[variant])
    yield Finding(
        best.cause,
        best.problem,
        f"the loss of one batch goes {text}, but with {best.description} it ends at {float(tried[best][-1].mean()):.3g}",
        best.key,
        best.remedy,
    )


def _fall(losses: torch.Tensor) -> float:
    return float((losses[0] / losses[-1].clamp(min=1e-12)).log().mean())
