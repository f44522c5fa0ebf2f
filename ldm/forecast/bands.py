"""Forecasts of the loss with bands, from a fit of the scaling curves that is repeated on perturbed data.

Bands hold three kinds of errors. *Parameters*: the fit is repeated with losses and means of the prior that are perturbed by
their standard deviations (randomize-then-optimize, Bardsley et al. 2014, SIAM J. Sci. Comput. 36, A1895), which gives about
a sample of the posterior distribution, also of parameters that the runs do not determine. *Runs*: another seed gives another
loss; its standard deviation is estimated from the residuals, those of repeated seeds among them. *Model*: the true curve is no
sum of power laws. How far the log loss falls below that of all runs is uncertain by a factor, which is likely above 1 for runs
that have hardly left the plateau of the first steps, after which the loss falls faster than any curve that is fitted to it. And
the longest runs are forecast from the others: the spread is enlarged by how far they miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.forecast.curves import Law, Prior, degrees_of_freedom, fit, log_loss, plateau_share, prior_of

LEVEL = 0.8
"""Probability of a band."""

DRAWS = 400
"""Number of repeated fits."""

NOISE, NOISE_WEIGHT = 0.005, 2.0
"""Prior of the standard deviation of a run's log loss, and the number of residuals that it counts as."""

FEWEST = 4
"""Least number of runs from which anything is forecast."""

INFLATION_WEIGHT = 4.0
"""Number of left-out runs as which the bands without model error count."""

PLATEAU_FALL, FALL_SPREAD = 2.0, 0.35
"""Factor between how far the log loss falls below that of all runs, and the curve: its median if all runs are on the plateau of
the first steps, which goes to 1 as they leave it, and the standard deviation of its logarithm."""

NORMAL_WIDTH = 2.5631031310892007
"""Width of the band of a standard normal variable."""


@dataclass(frozen=True)
class Band:
    """Median of a forecast and the limits of its 80 % band."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> Band:
        """Return the band of draws ``[n]``."""
        low, median, high = np.quantile(draws, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Curves:
    """Scaling curves fitted to the runs of one or many ladders.

    Attributes:
        best: most probable parameters, ``[..., p]``; see :mod:`ldm.forecast.curves`.
        draws: parameters of the repeated fits, ``[..., d, p]``.
        noise: standard deviation of the log loss of a run, in each draw, ``[..., d]``.
        lowest: lowest log loss of the runs, ``[...]``.
        factor: on how far the log loss falls below it, in each draw, ``[..., d]``.
        inflation: factor by which the spread of the draws is enlarged for the error of the model, at least 1, ``[...]``.
    """

    best: np.ndarray
    draws: np.ndarray
    noise: np.ndarray
    lowest: np.ndarray
    factor: np.ndarray
    inflation: np.ndarray

    def log_losses(self, log_ratios: np.ndarray) -> np.ndarray:
        """Return draws of the expected log loss at points ``[m k]``, ``[..., d, m]``; draws of one number belong together."""
        return self._spread(_beyond(log_loss(self.draws, log_ratios), self.lowest, self.factor))

    def log_floors(self) -> np.ndarray:
        """Return draws of the log loss that remains with unlimited quantities, ``[..., d]``; see :meth:`log_losses`."""
        return self._spread(_beyond(self.draws[..., :1], self.lowest, self.factor))[..., 0]

    def _spread(self, draws: np.ndarray) -> np.ndarray:
        """Enlarge the spread of draws ``[..., d, m]`` for the error of the model."""
        middle = np.median(draws, axis=-2, keepdims=True)
        found: np.ndarray = middle + self.inflation[..., None, None] * (draws - middle)
        return found

    def runs(self, log_ratios: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return draws of the loss of a run at each of the points ``[m k]``, ``[..., d, m]``."""
        expected = self.log_losses(log_ratios)
        losses: np.ndarray = np.exp(expected + self.noise[..., None] * generator.standard_normal(expected.shape))
        return losses


def fit_curves(
    log_ratios: np.ndarray,
    losses: np.ndarray,
    *,
    law: Law | None = None,
    left_out: Sequence[int] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> Curves:
    """Fit the curves to the losses of ladders, with draws for the bands.

    Args:
        log_ratios: logarithms of the quantities of each run, divided by those of the full run, ``[n k]``.
        losses: loss of each run, positive, ``[..., n]``; leading dimensions are ladders with the same runs.
        law: which parameters the curves have; None = a power law of each quantity.
        left_out: numbers of runs that are forecast from the others, to see how far the curves miss.
        draws: number of repeated fits.
        seed: seed of the perturbations.
    """
    law = law or Law(log_ratios.shape[-1])
    generator = np.random.default_rng(seed)
    flat = losses.reshape(-1, losses.shape[-1])
    best, found, noise = _draws(log_ratios, flat, law, draws, generator)
    inflation = _inflation(log_ratios, flat, left_out, law, draws, generator)
    shape = losses.shape[:-1]
    return Curves(
        best.reshape(*shape, -1),
        found.reshape(*shape, draws, -1),
        noise.reshape(*shape, draws),
        np.log(losses).min(-1),
        fall_factors(found, log_ratios, generator).reshape(*shape, draws),
        inflation.reshape(shape),
    )


def fall_factors(parameters: np.ndarray, log_ratios: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return draws of the factor on the fall beyond the runs ``[b d]`` for draws of the parameters ``[b d p]``."""
    median = PLATEAU_FALL ** plateau_share(parameters, log_ratios)
    factors: np.ndarray = median * np.exp(FALL_SPREAD * generator.standard_normal(median.shape))
    return factors


def _beyond(expected: np.ndarray, lowest: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return log losses ``[..., d, m]`` whose fall below the lowest of the runs is multiplied by the factor of each draw."""
    lowest = lowest[..., None, None]
    return np.maximum(expected, lowest) + factor[..., None] * np.minimum(expected - lowest, 0)


def _draws(
    log_ratios: np.ndarray, losses: np.ndarray, law: Law, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best parameters ``[b p]``, draws of them ``[b d p]`` and of the noise ``[b d]``."""
    logs, prior = np.log(losses), prior_of(losses.min(-1), law)
    best, sigma, free = _best(log_ratios, logs, prior)
    b, p = best.shape
    # The scaled inverse chi-squared distribution of the variance
    noise = sigma[:, None] * np.sqrt(free[:, None] / generator.chisquare(free[:, None], (b, draws)))
    means = prior.mean[:, None] + prior.spread * generator.standard_normal((b, draws, p))
    perturbed = logs[:, None] + noise[..., None] * generator.standard_normal((b, draws, logs.shape[-1]))
    found = fit(
        log_ratios,
        perturbed.reshape(b * draws, -1),
        Prior(means.reshape(b * draws, p), prior.spread),
        noise.reshape(-1),
        np.repeat(best, draws, axis=0),
    )
    return best, found.reshape(b, draws, p), noise


def _best(log_ratios: np.ndarray, logs: np.ndarray, prior: Prior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best parameters ``[b p]``, the noise ``[b]``, and the number of residuals that it rests on ``[b]``."""
    sigma = np.full(len(logs), NOISE)
    best: np.ndarray | None = None
    for _ in range(4):
        best = fit(log_ratios, logs, prior, sigma, best)
        residual = np.abs(logs - log_loss(best, log_ratios))
        free = np.maximum(logs.shape[-1] - degrees_of_freedom(log_ratios, prior, sigma, best), 0.5)
        limit = 3 * np.maximum(
            1.4826 * np.median(residual, axis=-1), NOISE / 2
        )  # outliers have Huber's loss in the fit
        squares = np.square(np.minimum(residual, limit[:, None])).sum(-1)
        sigma = np.sqrt((squares + NOISE_WEIGHT * NOISE**2) / (free + NOISE_WEIGHT))
    assert best is not None
    return best, sigma, free + NOISE_WEIGHT


def _inflation(
    log_ratios: np.ndarray,
    losses: np.ndarray,
    left_out: Sequence[int],
    law: Law,
    draws: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return by how much some runs miss their forecasts from the others, as a factor on the spread, ``[b]``."""
    left = np.array(left_out, int)
    kept = np.setdiff1d(np.arange(losses.shape[-1]), left)
    if not len(left) or len(kept) < FEWEST:
        return np.ones(len(losses))
    _, found, noise = _draws(log_ratios[kept], losses[:, kept], law, draws, generator)
    lowest = np.log(losses[:, kept]).min(-1)
    factors = fall_factors(found, log_ratios[kept], generator)
    predicted = _beyond(log_loss(found, log_ratios[left]), lowest, factors)
    predicted += noise[..., None] * generator.standard_normal(predicted.shape)
    low, middle, high = np.quantile(predicted, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2], axis=1)
    missed = (np.log(losses[:, left]) - middle) / ((high - low) / NORMAL_WIDTH)
    squares = (missed**2).sum(-1)
    return np.sqrt(np.maximum(1, (INFLATION_WEIGHT + squares) / (INFLATION_WEIGHT + len(left))))
