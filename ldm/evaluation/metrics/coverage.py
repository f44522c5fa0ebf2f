"""Precision, recall, density and coverage of generated images, from balls around features that reach to the k-th neighbour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.evaluation.intervals import Estimate, bootstrap, jackknife, wilson
from ldm.evaluation.metric import Number, metric

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject

PRECISION_K, DENSITY_K = 3, 5
"""Numbers of neighbours of the papers: Kynkäänniemi et al. 2019 and Naeem et al. 2020."""

CHUNK = 1024
"""Number of rows compared at once, which bounds the memory."""


def radii(features: Tensor, k: int) -> Tensor:
    """Return the distance of each of the features ``[n d]`` to its k-th nearest other one, ``[n]``; n > k."""
    parts = [torch.cdist(part, features, compute_mode="donot_use_mm_for_euclid_dist") for part in features.split(CHUNK)]
    return torch.cat([part.kthvalue(k + 1, dim=1).values for part in parts])  # the nearest is the feature itself


def balls_around(points: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """Return in how many balls with ``centres [m d]`` and ``radius [m]`` each of the points ``[n d]`` lies, ``[n]``."""
    parts = []
    for part in points.split(CHUNK):
        distance = torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist")
        parts.append((distance <= radius).sum(dim=1))
    return torch.cat(parts)


def precision_and_recall(made: Tensor, true: Tensor, k: int = PRECISION_K) -> dict[str, Estimate]:
    """Return precision and recall of features ``made [n d]`` against ``true [m d]``.

    After Kynkäänniemi et al. 2019, arXiv 1904.06991. Precision is the share of generated images in the ball of a true one, recall
    the share of true images in the ball of a generated one (equations 1 and 2). True images are fixed:
    precision is then a share of independent hits; the interval of recall is that of the jackknife.
    """
    made, true = made.double(), true.double()
    reach = radii(true, k)

    def recall(index: object) -> float:
        kept = made[torch.as_tensor(index)]
        return float((balls_around(true, kept, radii(kept, k)) > 0).double().mean())

    return {
        "precision": wilson((balls_around(made, true, reach) > 0).numpy()),
        "recall": jackknife(len(made), recall).within(0, 1),
    }


def density_and_coverage(made: Tensor, true: Tensor, k: int = DENSITY_K) -> dict[str, Estimate]:
    """Return density and coverage of features ``made [n d]`` against ``true [m d]`` (Naeem et al. 2020, arXiv 2002.09797).

    Density is the number of balls of true images that a generated image lies in, over k (equation 5); coverage the share of true
    images whose ball holds a generated image (equation 6). True images are fixed.
    """
    made, true = made.double(), true.double()
    reach = radii(true, k)
    nearest = torch.cat(
        [
            torch.cdist(part, made, compute_mode="donot_use_mm_for_euclid_dist") <= r[:, None]
            for part, r in _rows(true, reach)
        ]
    )  # [m n]
    return {
        "density": bootstrap(nearest.double().sum(dim=0).numpy() / k),
        "coverage": jackknife(
            len(made), lambda index: float(nearest[:, torch.as_tensor(index)].any(1).double().mean())
        ).within(0, 1),
    }


def _rows(true: Tensor, reach: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(true.split(CHUNK), reach.split(CHUNK), strict=True)


@metric("precision_recall", "samples")
def manifold(subject: Subject) -> Iterator[Number]:
    """Measure precision, recall, density and coverage against the true images of the reference split."""
    if not subject.generates:
        return
    reference, made = subject.true(subject.reference), subject.generated()
    if min(len(reference), len(made)) <= DENSITY_K + 1:
        return
    for network in subject.networks:
        pair = made.features[network.name], reference.features[network.name]
        for k, found in ((PRECISION_K, precision_and_recall(*pair)), (DENSITY_K, density_and_coverage(*pair))):
            for name, value in found.items():
                yield Number(
                    name, value, len(made), "higher", network=network, reference=subject.reference, parameters={"k": k}
                )
