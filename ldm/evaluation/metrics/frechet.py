"""Fréchet distance between features (Heusel et al. 2017, arXiv 1706.08500, equation 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from ldm.evaluation.intervals import GROUPS, Estimate, group_of, jackknife, jackknife_of
from ldm.evaluation.metric import Number, metric

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject


class Moments(NamedTuple):
    """Mean and covariance of features.

    Attributes:
        mean: ``[d]``.
        root: matrix ``[r d]`` with root^T root = covariance, r = min(n, d).
    """

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Return the moments of features ``[n d]`` in fp64, with the unbiased covariance, that of one image being 0."""
        features = np.asarray(features, dtype=np.float64)
        mean = features.mean(axis=0)
        centred = (features - mean) / np.sqrt(max(1, len(features) - 1))
        if len(centred) > centred.shape[1]:
            centred = np.linalg.qr(centred, mode="r")
        return cls(mean, centred)

    @classmethod
    def of_gaussian(cls, mean: np.ndarray, covariance: np.ndarray) -> Moments:
        """Return given moments, ``[d]`` and ``[d d]``; the covariance may be singular."""
        values, vectors = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
        return cls(np.asarray(mean, dtype=np.float64), np.sqrt(values.clip(min=0))[:, None] * vectors.T)

    @property
    def variance(self) -> float:
        """Trace of the covariance."""
        return float(np.square(self.root).sum())


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0; NaN if a feature is not finite.

    With C = R^T R, the last trace is the sum of the singular values of R1 R2^T, which needs no square root of a matrix and
    holds for singular covariances, such as those of fewer images than features.
    """
    difference = first.mean - second.mean
    if not all(np.isfinite(each).all() for each in (*first, *second)):
        return math.nan
    cross = np.linalg.svd(first.root @ second.root.T, compute_uv=False).sum()
    return max(0.0, float(difference @ difference + first.variance + second.variance - 2 * cross))


def estimate(features: Tensor, reference: Tensor) -> Estimate:
    """Return the distance of features ``[n d]`` to a fixed reference ``[m d]``, with its interval over the former.

    The distance has a bias of about d / n, so numbers of different n are not comparable.
    """
    rows, fixed = features.double().numpy(), Moments.of(reference.double().numpy())
    if len(rows) > max(GROUPS, rows.shape[1]):
        return _estimate_by_products(rows, fixed).within(0)
    return jackknife(len(rows), lambda index: frechet_distance(Moments.of(rows[index]), fixed)).within(0)


def _estimate_by_products(rows: np.ndarray, fixed: Moments) -> Estimate:
    """Return the distance of more rows than features, ``[n d]``, with its interval.

    The singular values of R1 R2^T are the square roots of the eigenvalues of R2 C1 R2^T, and this matrix is, without a group of
    the jackknife, the difference of sums of products of rows. An eigenvalue is exact to the rounding of the largest one.
    """
    if not all(np.isfinite(each).all() for each in (rows, *fixed)):
        return jackknife_of(math.nan, [])
    group, rows = group_of(len(rows)), rows - fixed.mean
    groups = [group == i for i in range(GROUPS)]
    projected = rows @ fixed.root.T
    parts = [  # of which those of all rows are the sums
        (projected[each].T @ projected[each], rows[each].sum(axis=0), np.square(rows[each]).sum(), each.sum())
        for each in groups
    ]
    total = [sum(each) for each in zip(*parts, strict=True)]

    def value(product: np.ndarray, sum_of_rows: np.ndarray, square: float, count: int) -> float:
        mean = sum_of_rows / count
        own = fixed.root @ mean
        variance = (square - count * float(mean @ mean)) / (count - 1)
        eigenvalues = np.linalg.eigvalsh((product - count * np.outer(own, own)) / (count - 1))
        cross = float(np.sqrt(eigenvalues.clip(min=0)).sum())
        return max(0.0, float(mean @ mean + variance) + fixed.variance - 2 * cross)

    without = [value(*(of_all - of_group for of_all, of_group in zip(total, part, strict=True))) for part in parts]
    return jackknife_of(value(*total), without)


@metric("fid", "samples")
def fid(subject: Subject) -> Iterator[Number]:
    """Compare generated images with the true ones of the reference split."""
    if not subject.generates:
        return
    networks = subject.feature_networks
    reference, made = subject.true(subject.reference), subject.generated()
    for network in networks:
        found = estimate(made.features[network.name], reference.features[network.name])
        yield Number("fid", found, len(made), "lower", network=network, reference=subject.reference)


@metric("rfid", "vae")
def rfid(subject: Subject) -> Iterator[Number]:
    """Compare reconstructions with their originals."""
    if subject.first_stage is None:
        return
    networks = subject.feature_networks
    made = subject.reconstructions()
    for network in networks:
        found = estimate(made.features[network.name], made.originals[network.name])
        yield Number("rfid", found, len(made), "lower", network=network)  # the reference is the evaluated images
