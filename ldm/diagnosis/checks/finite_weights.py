"""Weights: whether all are finite."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.training.ema import not_finite


@check(Topic.WEIGHTS, "finite weights")
def finite_weights(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Check all weights, averaged and current, of all stages; the networks cannot compute anything with NaN."""
    count = 0
    for stage, weights in run.stages.items():
        for name, state in (("averaged", weights.average), ("current", weights.current or {})):
            count += len(state)
            if broken := not_finite(state):
                yield Finding(
                    "weights_not_finite",
                    f"the {name} weights of stage {stage} hold NaN or infinite values",
                    f"the first is {broken} in {weights.path}",
                    f"{stage}.train.learning_rate",
                    "restore an earlier checkpoint, such as best.ckpt, and resume with a lower learning rate",
                )
                return
    yield Measured(f"{count} tensors, all finite")
