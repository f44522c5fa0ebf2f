"""Memorisation: how often generated images are nearer to the training images than true held-out images are.

After the test of data copying by Meehan et al. 2020 (arXiv 2004.05675), without its cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.evaluation.intervals import Estimate, mean_estimate
from ldm.evaluation.metric import Better, Number, metric
from ldm.evaluation.metrics.coverage import distances

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject


def nearest(features: Tensor, training: Tensor) -> np.ndarray:
    """Return the Euclidean distance of each of the features ``[n d]`` to the nearest of ``training [m d]``: ``[n]``."""
    parts = [part.amin(dim=1) for part in distances(features, training)]
    found: np.ndarray = torch.cat(parts).numpy()
    return found


def nearer_share(made: np.ndarray, held_out: np.ndarray) -> Estimate:
    """Return how often a generated image is nearer to the training images than a held-out one, over all pairs; ties count half.

    It is the statistic of Mann & Whitney 1947 over n m: 0.5 for a model that generalizes as well as the held-out images are
    apart from the training set, 1 for copies. The held-out images are fixed.

    Args:
        made, held_out: distances ``[n]`` and ``[m]`` to the nearest training image.
    """
    others = np.sort(held_out)
    below, up_to = np.searchsorted(others, made, "left"), np.searchsorted(others, made, "right")
    shares = 1 - (below + up_to) / 2 / len(others)
    return mean_estimate(shares).within(0, 1)


@metric("memorisation", "samples", numbers=("memorisation", "nearest_training_image", "nearest_training_image_true"))
def memorisation(subject: Subject) -> Iterator[Number]:
    """Compare the distances of generated and of true held-out images to the nearest training image."""
    if not subject.generates or "train" not in subject.sets:
        return
    networks = subject.feature_networks
    training, made = subject.true("train"), subject.generated()
    held_out = subject.true(subject.split)
    for network in networks:
        reference = training.features[network.name]
        own = nearest(made.features[network.name], reference)
        others = nearest(held_out.features[network.name], reference)
        numbers: tuple[tuple[str, Estimate, Better], ...] = (
            ("memorisation", nearer_share(own, others), "lower"),
            ("nearest_training_image", mean_estimate(own), "neither"),
            ("nearest_training_image_true", mean_estimate(others), "neither"),
        )
        for name, found, better in numbers:
            n = len(others) if name.endswith("true") else len(own)
            yield Number(
                name, found, n, better, network=network, reference="train", parameters={"held_out": len(others)}
            )
