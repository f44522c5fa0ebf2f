"""Optimization: the error on training against validation images."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.pool import LEVELS
from ldm.diagnosis.statistics import unpaired


@check(Topic.OPTIMIZATION, "training against validation images", weight=2, stages=("denoiser",))
def overfitting(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare the error of the sampled model on training and on validation images, by noise level.

    A model that has memorised its training images denoises them better than images of the same kind. Half as much error again
    on new images is where less is due to the kind of image than to having seen it.
    """
    seen = run.errors(Clock(clock.left / 2))
    text = "error by position in the schedule: " + ", ".join(
        f"{position:g}: {float(value):.3f}" for position, value in zip(LEVELS, seen.mean(0), strict=True)
    )
    if not run.validates:
        yield Measured(f"{text} (training images; there are no validation images)")
        return
    new = run.errors(clock, "val")
    compared = unpaired(new.mean(1), seen.mean(1))
    yield Measured(f"{text}; {compared.second:.3f} on training and {compared.first:.3f} on validation images")
    if compared.is_greater and compared.ratio > 1.5:
        yield Finding(
            "overfitted",
            "the model has memorised its training images",
            f"its error is {compared.second:.3f} on training images and {compared.first:.3f} on validation images, "
            f"{compared.z:.0f} standard errors apart; there are {len(run.samples('train'))} training images",
            "data.train",
            "add images, set data.flip or denoiser.model.dropout, or stop where val/loss was lowest",
        )
