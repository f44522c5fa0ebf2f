"""EMA: whether the averaged weights are as good as the current ones."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.statistics import paired


@check(Topic.EMA, "averaged against current weights", weight=2, stages=("denoiser",))
def averaged_weights(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare the errors of the averaged and the current weights on the same samples with the same noise.

    Averaging removes the noise of the last steps, so that the average is better or as good. If it is significantly worse by more
    than a twentieth, it still contains weights from long before.
    """
    weights = run.stages["denoiser"]
    if weights.current is None or not weights.checkpoint.get("ema"):
        return
    average = run.errors(Clock(clock.left / 2)).mean(1)
    current = run.errors(clock, averaged=False).mean(1)
    n = min(len(average), len(current))
    compared = paired(average[:n], current[:n])
    decay = run.experiment.denoiser.train.ema_decay
    text = (
        f"error {compared.first:.3f} averaged and {compared.second:.3f} current, {compared.z:.1f} standard errors apart; "
        f"decay {decay:g} after {weights.steps} steps"
    )
    yield Measured(text)
    if compared.is_greater and compared.ratio > 1.05:
        yield Finding(
            "ema_lags",
            "the averaged weights, which are sampled, lag behind the trained ones",
            text,
            "denoiser.train.ema_decay",
            "lower it to 0.999 or less, or train longer",
        )
