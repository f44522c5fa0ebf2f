"""Objective: whether the model is sampled with the settings that it was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ldm.config import to_dict
from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun


@check(Topic.OBJECTIVE, "settings of the training", stages=("denoiser",))
def settings_changed(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare schedule and parametrization with those recorded in ``last.ckpt``.

    With another schedule, the network is given another noise level than that of its input.
    """
    recorded = run.recorded_settings("denoiser")
    if not recorded:
        return
    changes = list(_differences(recorded.get("diffusion", {}), to_dict(run.config.diffusion), "denoiser.diffusion"))
    yield Measured(f"{len(changes)} settings of the diffusion differ from those that last.ckpt was trained with")
    for key, (before, now) in changes:
        yield Finding(
            "prediction_type" if "parametrization" in key else "schedule_changed",
            "the model is sampled with another diffusion than it was trained with",
            f"{key} was {before!r} in training and is {now!r} now",
            key,
            f"set it to {before!r}",
        )


def _differences(before: Any, now: Any, where: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the dotted name and both values of each field that differs between two plain configs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before.get("kind") == now.get("kind"):
        for name in before.keys() & now.keys():
            yield from _differences(before[name], now[name], f"{where}.{name}")
    elif before != now:
        kinds = [each.get("kind", each) if isinstance(each, Mapping) else each for each in (before, now)]
        yield where, (kinds[0], kinds[1])
