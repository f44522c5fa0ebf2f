"""Objective: whether the network predicts what the config says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.pool import CHUNK, Pool, noise_levels, outputs
from ldm.diagnosis.statistics import paired
from ldm.diffusion.parametrization import X0, Edm, EdmV, Eps, Parametrization, V

LEAST = 0.3
"""Correlation of outputs and targets from which a network has learned something: a tenth of the variance."""


@check(Topic.OBJECTIVE, "prediction type of the network", stages=("denoiser",))
def prediction_type(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Correlate the outputs of the network with the targets of every parametrization that gives it the same input.

    A network that has learned anything correlates most with the target that it was trained for. One that has learned nothing
    correlates with none.
    """
    pool = run.pool("train")  # which a model that has memorised its images knows best
    pool, model = pool.take(np.arange(min(4 * CHUNK, len(pool)))), run.averaged
    own = model.diffusion.parametrization
    levels = noise_levels(model)
    made = [outputs(model, pool, level.expand(len(pool))) for level in levels]
    found = {each.kind: _correlation(made, each, pool, levels) for each in (own, *_rivals(own))}
    text = ", ".join(f"{kind} {float(values.mean()):.2f}" for kind, values in found.items())
    yield Measured(f"correlation of the outputs with the targets of: {text}")
    best = max(found, key=lambda kind: float(found[kind].mean()))
    if best != own.kind and float(found[best].mean()) > LEAST and paired(found[best], found[own.kind]).is_greater:
        yield Finding(
            "prediction_type",
            f"the network predicts {best}, but the config says {own.kind}",
            f"correlation of its outputs with the targets of {text}",
            "denoiser.diffusion.parametrization",
            f"set it to {best}",
        )


def _rivals(own: Parametrization) -> list[Parametrization]:
    """Return the other parametrizations under which the network would have the same input."""
    if isinstance(own, Edm):
        return [Edm(own.sigma_data) if isinstance(own, EdmV) else EdmV(own.sigma_data)]
    return [each for each in (Eps(), V(), X0()) if isinstance(own, (Eps, V, X0)) and each.kind != own.kind]


def _correlation(made: Sequence[Tensor], parametrization: Parametrization, pool: Pool, levels: Tensor) -> Tensor:
    """Return the cosine between outputs and targets of each sample, over all noise levels, ``[n]``."""
    targets = [parametrization.target(pool.latents, pool.noise, level) for level in levels]
    output, target = (torch.stack(list(each), dim=1).flatten(1) for each in (made, targets))
    return F.cosine_similarity(output, target, dim=1)
