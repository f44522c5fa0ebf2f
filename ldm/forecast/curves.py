"""Scaling curves: a floor and a power law for each quantity, fitted to many data sets at once.

With the ratios r_k of the quantities (parameters, images, steps) to those of the full run, the loss is

    L(r) = E + sum over k of A_k r_k^(-alpha_k)

(Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5, and Hoffmann et al. 2022, arXiv 2203.15556, eq. 2). As in section D.2 of the
latter, the residuals are those of log L, with Huber's loss, and E and A_k are exponentials of the parameters, so that log L is
their log-sum-exp. Since r = 1 at the full run, A_k is what the finite quantity k adds to the loss there.

At its beginning a training follows no power law of its steps: the loss leaves a plateau, faster and faster on a double
logarithmic scale. With an offset r_0, the last quantity, the steps, counts as (r + r_0) / (1 + r_0), so that its term is a power
law from some times r_0 on and flat before. A ladder that has only seen the plateau then does not know how steep the loss will
fall, and says so by wide bands.

A larger model also learns more from a step (Kaplan et al. 2020, figure 2): with a gain gamma, a step of a model with the ratio
r_1, that of the first quantity, counts as r_1^gamma steps of the model of the full run, before the offset.

A dozen runs do not determine all of these parameters. Each has a weak normal prior, which decides where the runs do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FLOOR_SHARE, FLOOR_SPREAD = 0.3, 1.5
"""Prior of the floor: its median as a share of the lowest loss, and the standard deviation of its logarithm."""

TERM_SHARE, TERM_SPREAD = 0.05, 1.5
"""Prior of what a quantity adds to the loss of the full run, likewise."""

EXPONENT, EXPONENT_SPREAD = 0.5, 0.6
"""Prior of an exponent: its median, and the standard deviation of its logarithm; 0.15 to 1.7 at two standard deviations."""

OFFSET_STEPS, OFFSET_SPREAD = 250, 1.5
"""Prior of the offset of the steps: its median, and the standard deviation of its logarithm."""

GAIN, GAIN_SPREAD = 0.1, 1.5
"""Prior of the gain of a step by the size of the model, likewise."""

HUBER = 1.5
"""Number of standard deviations from which the loss of a residual is linear."""

ITERATIONS = 60
"""Most iterations of a fit."""

TOLERANCE, LARGEST_DAMPING = 1e-4, 1e6
"""Gain of the log density below which a fit has ended, and the damping above which it is given up."""


@dataclass(frozen=True)
class Law:
    """Which parameters a curve has.

    Attributes:
        quantities: number of quantities.
        offset: median of the prior of the offset of the last quantity, relative to the full run; None = without one.
        gain: True if a unit of the last quantity counts for more with the first one; needs an offset.
    """

    quantities: int
    offset: float | None = None
    gain: bool = False

    def __post_init__(self) -> None:
        assert self.offset is not None or not self.gain, "a gain needs an offset"


@dataclass(frozen=True)
class Prior:
    """Independent normal priors of the parameters: means ``[..., p]`` and standard deviations ``[p]``."""

    mean: np.ndarray
    spread: np.ndarray


def prior_of(lowest: np.ndarray, law: Law) -> Prior:
    """Return the prior for data sets whose lowest loss is ``lowest`` ``[...]``."""
    quantities = law.quantities
    level = np.log(lowest)[..., None]
    floor, term = level + np.log(FLOOR_SHARE), level + np.log(TERM_SHARE)
    exponents = np.full_like(level, np.log(EXPONENT))
    means = [floor, *[term] * quantities, *[exponents] * quantities]
    spreads = [FLOOR_SPREAD, *[TERM_SPREAD] * quantities, *[EXPONENT_SPREAD] * quantities]
    if law.offset is not None:
        means.append(np.full_like(level, np.log(law.offset)))
        spreads.append(OFFSET_SPREAD)
    if law.gain:
        means.append(np.full_like(level, np.log(GAIN)))
        spreads.append(GAIN_SPREAD)
    return Prior(np.concatenate(means, axis=-1), np.array(spreads))


class _Parts(NamedTuple):
    """Parameters by name, each ``[..., 1, *]`` for one or ``k`` of them; ``offset`` and ``gain`` are None if there are none."""

    floor: np.ndarray
    terms: np.ndarray
    exponents: np.ndarray
    offset: np.ndarray | None
    gain: np.ndarray | None

    @classmethod
    def of(cls, parameters: np.ndarray, quantities: int) -> _Parts:
        ends = np.cumsum([1, quantities, quantities, 1])
        floor, terms, exponents, offset, gain = np.split(parameters[..., None, :], ends, axis=-1)
        return cls(floor, terms, exponents, offset if offset.size else None, gain if gain.size else None)

    def gained(self, log_ratios: np.ndarray) -> np.ndarray:
        """Return the logarithms of the last ratios with the gain by the first, ``[..., n]``."""
        last: np.ndarray = log_ratios[:, -1]
        return last if self.gain is None else last + np.exp(self.gain[..., 0]) * log_ratios[:, 0]

    def shifted(self, log_ratios: np.ndarray) -> np.ndarray:
        """Return the logarithms of the ratios with the gain and the offset of the last quantity, ``[..., n, k]``."""
        if self.offset is None:
            return log_ratios
        offset = self.offset[..., 0]
        last = np.logaddexp(self.gained(log_ratios), offset) - np.logaddexp(0, offset)
        others = np.broadcast_to(log_ratios[:, :-1], (*last.shape, log_ratios.shape[-1] - 1))
        return np.concatenate([others, last[..., None]], axis=-1)

    def contributions(self, log_ratios: np.ndarray) -> np.ndarray:
        """Return the floor and the loss by each quantity, ``[..., n, 1 + k]``."""
        laws = self.terms - np.exp(self.exponents) * self.shifted(log_ratios)
        return np.exp(np.concatenate([np.broadcast_to(self.floor, (*laws.shape[:-1], 1)), laws], axis=-1))


def log_loss(parameters: np.ndarray, log_ratios: np.ndarray) -> np.ndarray:
    """Return log L, ``[..., n]``.

    Args:
        parameters: log E, log A_k, log alpha_k, then log r_0 if there is an offset, then log gamma if there is a gain,
            ``[..., 1 + 2 k]`` to ``[..., 3 + 2 k]``.
        log_ratios: logarithms of the ratios to the full run, ``[n k]``.
    """
    parts = _Parts.of(parameters, log_ratios.shape[-1])
    found: np.ndarray = np.log(parts.contributions(log_ratios).sum(-1))
    return found


def plateau_share(parameters: np.ndarray, log_ratios: np.ndarray) -> np.ndarray:
    """Return r_0 / (r + r_0) of the longest of runs, ``[...]``: 1 if all of them are on the plateau, 0 if it is far behind them.

    The arguments are those of :func:`log_loss`; without an offset it is 0.
    """
    parts = _Parts.of(parameters, log_ratios.shape[-1])
    if parts.offset is None:
        return np.zeros(parameters.shape[:-1])
    return _logistic(parts.offset[..., 0, 0] - parts.gained(log_ratios).max(-1))


def log_loss_and_gradient(parameters: np.ndarray, log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log L ``[..., n]`` and its derivatives by the parameters ``[..., n, p]``."""
    parts = _Parts.of(parameters, log_ratios.shape[-1])
    shares = parts.contributions(log_ratios)
    total = shares.sum(-1)
    shares /= total[..., None]
    slopes = -shares[..., 1:] * np.exp(parts.exponents)  # by the logarithms of the shifted ratios
    derivatives = [shares, slopes * parts.shifted(log_ratios)]
    if parts.offset is not None:
        gained, offset = parts.gained(log_ratios), parts.offset[..., 0]
        derivatives.append((slopes[..., -1] * (_logistic(offset - gained) - _logistic(offset)))[..., None])
        if parts.gain is not None:
            by_gain = _logistic(gained - offset) * (gained - log_ratios[:, -1])
            derivatives.append((slopes[..., -1] * by_gain)[..., None])
    return np.log(total), np.concatenate(derivatives, axis=-1)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def fit(
    log_ratios: np.ndarray,
    log_losses: np.ndarray,
    prior: Prior,
    sigma: np.ndarray,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Return the parameters of highest posterior density for each of ``b`` data sets, ``[b p]``.

    Levenberg's method on all data sets together (until each has converged); Huber's loss by iteratively reweighted least
    squares.

    Args:
        log_ratios: ``[n k]``, the same for all.
        log_losses: ``[b n]``.
        prior: of which the means are ``[b p]``.
        sigma: standard deviation of a log loss, ``[b]``.
        start: where to start, ``[b p]``; None for the best of the results from a few exponents.
    """
    if start is None:
        k = log_ratios.shape[-1]
        number = np.arange(prior.mean.shape[-1])
        of_exponents = (number > k) & (number <= 2 * k)
        starts = [prior.mean + shift * of_exponents for shift in (-0.7, 0.0, 0.7)]
        found = np.stack([fit(log_ratios, log_losses, prior, sigma, each) for each in starts])
        values = np.stack([_objective(log_ratios, log_losses, prior, sigma, each) for each in found])
        return found[values.argmin(0), np.arange(len(log_losses))]
    result, active = start.copy(), np.arange(len(start))
    damping = np.full(len(start), 1e-2)
    value = _objective(log_ratios, log_losses, prior, sigma, start)
    precision = np.diag(prior.spread**-2)
    for _ in range(ITERATIONS):
        parameters, logs, noise = result[active], log_losses[active], sigma[active]
        own = Prior(prior.mean[active], prior.spread)
        predicted, gradient = log_loss_and_gradient(parameters, log_ratios)
        residual = (logs - predicted) / noise[:, None]
        weight = np.minimum(1, HUBER / np.maximum(np.abs(residual), 1e-12))
        jacobian = gradient / noise[:, None, None]
        weighted = (jacobian * weight[..., None]).swapaxes(1, 2)
        normal = weighted @ jacobian + precision
        normal += damping[active][:, None, None] * np.eye(normal.shape[-1])
        towards = (weighted @ residual[..., None])[..., 0] + (own.mean - parameters) / prior.spread**2
        tried = parameters + np.clip(np.linalg.solve(normal, towards[..., None])[..., 0], -1, 1)
        new = _objective(log_ratios, logs, own, noise, tried)
        gain = value[active] - new
        better = gain >= 0
        result[active[better]], value[active[better]] = tried[better], new[better]
        damping[active] *= np.where(better, 0.2, 5)
        active = active[(gain < 0) & (damping[active] < LARGEST_DAMPING) | (gain > TOLERANCE)]
        if not len(active):
            break
    return result


def _objective(
    log_ratios: np.ndarray, log_losses: np.ndarray, prior: Prior, sigma: np.ndarray, parameters: np.ndarray
) -> np.ndarray:
    """Return the negative log posterior density, without constants, ``[b]``."""
    residual = np.abs(log_losses - log_loss(parameters, log_ratios)) / sigma[:, None]
    huber = np.where(residual < HUBER, residual**2 / 2, HUBER * (residual - HUBER / 2))
    value: np.ndarray = huber.sum(-1) + (((parameters - prior.mean) / prior.spread) ** 2).sum(-1) / 2
    return value


def degrees_of_freedom(log_ratios: np.ndarray, prior: Prior, sigma: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Return how many parameters the runs of each data set determine, ``[b]``: the trace of the hat matrix."""
    _, gradient = log_loss_and_gradient(parameters, log_ratios)
    jacobian = gradient / sigma[:, None, None]
    of_data = np.einsum("bnp,bnq->bpq", jacobian, jacobian)
    trace: np.ndarray = np.trace(np.linalg.solve(of_data + np.diag(prior.spread**-2), of_data), axis1=1, axis2=2)
    return trace
