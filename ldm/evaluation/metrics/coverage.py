"""Precision, recall, density and coverage of generated images, from balls around features that reach to the k-th neighbour."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.evaluation.intervals import GROUPS, Estimate, group_of, jackknife_of, mean_estimate, wilson
from ldm.evaluation.metric import Number, metric

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject

PRECISION_K, DENSITY_K = 3, 5
"""Numbers of neighbours of the papers: Kynkäänniemi et al. 2019 and Naeem et al. 2020."""

DISTANCES = 2**22
"""Largest number of distances that are computed at once, which bounds the memory."""

ROUNDING = 1e-12
"""Bound of the rounding of a squared distance by matrix products in fp64, relative to the squared lengths of the vectors."""


def rows(centres: int) -> int:
    """Return the number of points whose distances to so many centres are computed at once."""
    return max(1, DISTANCES // centres)


def distances(points: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """Yield the distances of points ``[n d]`` to centres ``[m d]`` in fp64, 0 for equal ones, as ``[rows(m) m]`` at a time."""
    points, centres = points.double(), centres.double()
    lengths = centres.square().sum(1)
    for part in points.split(rows(len(centres))):
        distance = torch.cdist(part, centres, compute_mode="use_mm_for_euclid_dist")
        rounding = ROUNDING * (part.square().sum(1)[:, None] + lengths)
        yield distance.masked_fill_(distance.square() <= rounding, 0)


def radii(features: Tensor, k: int) -> Tensor:
    """Return the distance of each of the features ``[n d]`` to its k-th nearest other one, ``[n]``; n > k."""
    return _radii_among(features, k, torch.ones(1, len(features), dtype=torch.bool))[0]


def balls_around(points: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """Return in how many balls with ``centres [m d]`` and ``radius [m]`` each of the points ``[n d]`` lies, ``[n]``."""
    return torch.cat([(part <= radius).sum(dim=1) for part in distances(points, centres)])


def precision_and_recall(made: Tensor, true: Tensor, k: int = PRECISION_K) -> dict[str, Estimate]:
    """Return precision and recall of features ``made [n d]`` against ``true [m d]``.

    After Kynkäänniemi et al. 2019, arXiv 1904.06991. Precision is the share of generated images in the ball of a true one, recall
    the share of true images in the ball of a generated one (equations 1 and 2). True images are fixed:
    precision is then a share of independent hits; the interval of recall is that of the jackknife.
    """
    reach = _radii_among(made, k, _kept(len(made)))
    hits = sum(torch.stack([(part <= radius).any(1).sum() for radius in reach]) for part in distances(true, made))
    shares = (torch.as_tensor(hits) / len(true)).tolist()
    return {
        "precision": wilson((balls_around(made, true, radii(true, k)) > 0).numpy()),
        "recall": jackknife_of(shares[0], shares[1:]).within(0, 1),
    }


def density_and_coverage(made: Tensor, true: Tensor, k: int = DENSITY_K) -> dict[str, Estimate]:
    """Return density and coverage of features ``made [n d]`` against ``true [m d]`` (Naeem et al. 2020, arXiv 2002.09797).

    Density is the number of balls of true images that a generated image lies in, over k (equation 5); coverage the share of true
    images whose ball holds a generated image (equation 6). True images are fixed.
    """
    keep = _kept(len(made))
    balls, covered = torch.zeros(len(made)), torch.zeros(len(keep))
    for part, reach in zip(distances(true, made), radii(true, k).split(rows(len(made))), strict=True):
        inside = part <= reach[:, None]
        balls += inside.sum(0)
        covered += torch.stack([(inside & each).any(1).sum() for each in keep])
    shares = (covered.double() / len(true)).tolist()
    return {
        "density": mean_estimate(balls.double().numpy() / k).within(0),
        "coverage": jackknife_of(shares[0], shares[1:]).within(0, 1),
    }


def _kept(n: int) -> Tensor:
    """Return which of n samples are kept, ``[1 + groups n]``: all of them, then all but those of each group of the jackknife."""
    group = torch.from_numpy(group_of(n))
    return torch.stack([group >= 0, *(group != i for i in range(GROUPS if n >= GROUPS else 0))])


def _radii_among(features: Tensor, k: int, keep: Tensor) -> Tensor:
    """Return :func:`radii` among the features that each row of ``keep [g n]`` keeps, ``[g n]``; minus infinity for the others.

    They are longer by the rounding of distances, so that a ball contains the neighbour that it reaches to, and its copies.
    """
    parts, rounding = [], 2 * ROUNDING * features.double().square().sum(1)
    for part in distances(features, features):
        among = [part.masked_fill(~kept, math.inf).kthvalue(k + 1, dim=1).values for kept in keep]
        parts.append(torch.stack(among))  # the nearest is the feature itself
    return (torch.cat(parts, dim=1).square() + rounding).sqrt().masked_fill(~keep, -math.inf)


@metric("precision_recall", "samples", numbers=("precision", "recall", "density", "coverage"))
def manifold(subject: Subject) -> Iterator[Number]:
    """Measure precision, recall, density and coverage against the true images of the reference split."""
    if not subject.generates:
        return
    networks = subject.feature_networks
    reference, made = subject.true(subject.reference), subject.generated()
    if min(len(reference), len(made)) <= DENSITY_K + 1:
        return
    for network in networks:
        pair = made.features[network.name], reference.features[network.name]
        for k, found in ((PRECISION_K, precision_and_recall(*pair)), (DENSITY_K, density_and_coverage(*pair))):
            for name, value in found.items():
                yield Number(
                    name, value, len(made), "higher", network=network, reference=subject.reference, parameters={"k": k}
                )
