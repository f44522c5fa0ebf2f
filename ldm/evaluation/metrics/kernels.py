"""Kernel distances between features: KID and CMMD, unbiased estimates of the squared maximum mean discrepancy (MMD)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.evaluation.intervals import GROUPS, Estimate, group_of, jackknife_of
from ldm.evaluation.metric import Number, metric

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Function of ``[... n d]`` and ``[... m d]`` in fp64 ``-> [... n m]``."""

CHUNK = 2048
"""Number of rows compared at once, which bounds the memory."""

SIGMA = 10.0
"""Bandwidth of CMMD's kernel."""

CMMD_SCALE = 1000.0
"""Factor by which CMMD is reported."""


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return (x . y / d + 1)^3, the kernel of KID (Bińkowski et al. 2018, arXiv 1801.01401, section 4)."""
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """Return exp(-|x - y|^2 / (2 sigma^2)), the kernel of CMMD (Jayasumana et al. 2024, arXiv 2401.09603, section 4)."""
    return torch.exp(-torch.cdist(x, y).square() / (2 * SIGMA**2))


def mmd(features: Tensor, reference: Tensor, kernel: Kernel) -> Estimate:
    """Return the unbiased MMD^2 of features ``[n d]`` and a reference ``[m d]`` (Gretton et al. 2012, equation 3).

    It is the mean of k(x, x') over pairs of different features, plus that over pairs of the reference, minus twice the mean of
    k(x, y). It can be negative. KID as published is the mean of the same over random subsets, whose expectation is this value.
    The interval is over the features; the reference is fixed.
    """
    x, y = features.double(), reference.double()
    group = torch.from_numpy(group_of(len(x)))
    own = _sums(x, x, kernel, group, group) - torch.diag(_group_sums(_diagonal(x, kernel), group))
    nothing = torch.zeros(len(y), dtype=torch.long)
    cross = _sums(x, y, kernel, group, nothing)[:, 0]
    within = float(_sums(y, y, kernel, nothing, nothing)[0, 0] - _diagonal(y, kernel).sum()) / (len(y) * (len(y) - 1))
    counts = np.bincount(group.numpy(), minlength=GROUPS)

    def value(left_out: int | None) -> float:
        keep = torch.ones(GROUPS, dtype=torch.float64)
        n = len(x)
        if left_out is not None:
            keep[left_out], n = 0, n - int(counts[left_out])
        return float(keep @ own @ keep) / (n * (n - 1)) + within - 2 * float(keep @ cross) / (n * len(y))

    return jackknife_of(value(None), [value(i) for i in range(GROUPS)] if len(x) >= GROUPS else [])


def _sums(x: Tensor, y: Tensor, kernel: Kernel, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sums of the kernel over all pairs of two groups, ``[GROUPS GROUPS]``."""
    total = torch.zeros(GROUPS, GROUPS, dtype=torch.float64)
    for part, group in zip(x.split(CHUNK), rows.split(CHUNK), strict=True):
        for other, column in zip(y.split(CHUNK), columns.split(CHUNK), strict=True):
            by_row = torch.zeros(GROUPS, len(other), dtype=torch.float64).index_add_(0, group, kernel(part, other))
            total.index_add_(1, column, by_row)
    return total


def _diagonal(x: Tensor, kernel: Kernel) -> Tensor:
    return kernel(x[:, None], x[:, None]).flatten()


def _group_sums(values: Tensor, group: Tensor) -> Tensor:
    return torch.zeros(GROUPS, dtype=torch.float64).index_add_(0, group, values)


@metric("kid", "samples")
def kid(subject: Subject) -> Iterator[Number]:
    """Compare generated images with the true ones of the reference split by the kernel of KID."""
    parameters = {"kernel": "(x.y/d + 1)^3", "estimator": "unbiased, all pairs"}
    yield from _distance(subject, "kid", polynomial, 1.0, parameters)


@metric("cmmd", "samples")
def cmmd(subject: Subject) -> Iterator[Number]:
    """Compare generated images with the true ones by the kernel of CMMD, times 1000.

    CMMD proper is that of the feature network ``clip`` with ViT-L/14 at 336 pixels.
    """
    yield from _distance(subject, "cmmd", gaussian, CMMD_SCALE, {"sigma": SIGMA, "scale": CMMD_SCALE})


def _distance(
    subject: Subject, name: str, kernel: Kernel, scale: float, parameters: Mapping[str, float | str]
) -> Iterator[Number]:
    if not subject.generates:
        return
    networks = subject.feature_networks
    reference, made = subject.true(subject.reference), subject.generated()
    if min(len(reference), len(made)) < 2:
        return
    for network in networks:
        found = mmd(made.features[network.name], reference.features[network.name], kernel)
        scaled = Estimate(found.value * scale, found.low * scale, found.high * scale, found.method)
        yield Number(
            name, scaled, len(made), "lower", network=network, reference=subject.reference, parameters=parameters
        )
