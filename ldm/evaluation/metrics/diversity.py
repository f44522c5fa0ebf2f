"""Diversity of the images for one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ldm.evaluation.intervals import mean_estimate
from ldm.evaluation.metric import Number, metric
from ldm.evaluation.subject import READER

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject


def mean_pairwise_distance(features: Tensor) -> float:
    """Return the mean of 1 - cos over all pairs of different features ``[n d]``, n >= 2."""
    unit = F.normalize(features.double(), dim=-1)
    n = len(unit)
    cosines = unit @ unit.T
    return float(1 - (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))


@metric("diversity", "samples", by_default=False)
def diversity(subject: Subject) -> Iterator[Number]:
    """Measure the mean pairwise distance of images for one caption, the mean over captions at even distances in the split.

    The interval is over captions. A model that ignores its noise has 0; one that ignores its caption is diverse, too.
    """
    from ldm.data.samples import BatchIndices, captions_of

    if not subject.samples_text:
        return
    networks = subject.feature_networks
    if not networks:
        return
    count, repeats = subject.options.repeats
    rows = subject.true(subject.split).rows
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]
    captions = captions_of(subject.sets[subject.split].annotations(BatchIndices(rows)), READER)
    distances: dict[str, list[float]] = {each.name: [] for each in networks}
    for number, caption in enumerate(captions):
        seed = subject.options.seed + number * repeats
        made = subject.generate([caption] * repeats, seed, {**subject.settings, **subject.further})
        for network in networks:
            distances[network.name].append(mean_pairwise_distance(network(made)))
    for network in networks:
        parameters = {"distance": "1 - cos", "images_per_caption": repeats}
        yield Number(
            "diversity",
            mean_estimate(distances[network.name]).within(0, 2),
            len(captions),
            "higher",
            network=network,
            parameters=parameters,
        )
