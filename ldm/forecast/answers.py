"""Answers from the fitted curves: what the full run reaches, when it stops paying, and what would help most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ldm.errors import TrainingError
from ldm.forecast.bands import DRAWS, FEWEST, Band, Curves, fit_curves
from ldm.forecast.curves import OFFSET_STEPS, Law
from ldm.forecast.ladder import Result
from ldm.forecast.plan import FULL, Rung, Size
from ldm.forecast.recall import RECALLS, RecallCurve, fit_recall

TWICE = 2.0
"""Factor by which each quantity is raised to see what helps most."""

WORTHWHILE = 0.01
"""Relative fall of the loss by twice the steps, below which further steps do not pay."""

FARTHEST = 64.0
"""Number of times the steps of the full run up to which the end of paying is searched."""

MODELS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""Parameters of models that are compared in the time of the full run, as factors on its own."""

NAMES = {"model": "a larger model", "images": "more images", "steps": "more steps"}
"""Quantities, and what having more of them is called."""


@dataclass(frozen=True)
class Point:
    """A forecast of one run.

    Attributes:
        steps: number of optimizer steps.
        hours: time on this machine.
        loss: band of the loss of the run.
        recall: band of the recall by k, measured on as many captions as for the ladder.
    """

    steps: int
    hours: float
    loss: Band
    recall: Mapping[str, Band] = field(default_factory=dict)


@dataclass(frozen=True)
class Lever:
    """Effect of twice as much of a quantity.

    Attributes:
        quantity: name in :data:`NAMES`.
        loss: band of the expected loss with twice as much.
        best: probability that it helps most of all quantities.
        hours: time of the run on this machine.
    """

    quantity: str
    loss: Band
    best: float
    hours: float


@dataclass(frozen=True)
class Model:
    """A model of another size that is trained for the time of the full run; ``parameters`` is a factor on its own."""

    parameters: float
    steps: int
    loss: Band


@dataclass(frozen=True)
class Forecast:
    """All answers.

    Attributes:
        full: the full run.
        expected: band of its expected loss, without the noise of a single run, against which the levers are compared.
        levers: what twice as much of each quantity would do, the most helpful first.
        pays_until: band of the steps from which twice the steps lower the loss by less than :data:`WORTHWHILE`; where it is
            :data:`FARTHEST` times the full run, further steps still pay there.
        models: models of other sizes in the same time; empty if all runs have the parameters of the full run.
        curve: forecasts for other numbers of steps.
        inflation: factor on the spread for the error of the model; see :mod:`ldm.forecast.bands`.
        noise: standard deviation of the logarithm of a run's loss.
        exponents: band of the exponent of each quantity.
        floor: band of the loss that remains with unlimited quantities.
        gain: band of the exponent of the parameters with which a step of a model counts; None if all runs have the parameters of
            the full run.
    """

    full: Point
    expected: Band
    levers: Sequence[Lever]
    pays_until: Band | None
    models: Sequence[Model]
    curve: Sequence[Point]
    inflation: float
    noise: float
    exponents: Mapping[str, Band]
    floor: Band
    gain: Band | None


def longest_runs(rungs: Sequence[Rung]) -> list[int]:
    """Return the numbers of the longest runs, one of each width, with the most images."""
    longest: dict[float, int] = {}
    for i, rung in enumerate(rungs):
        other = rungs[longest.setdefault(rung.width, i)]
        if (rung.steps, rung.images) > (other.steps, other.images):
            longest[rung.width] = i
    return sorted(longest.values())


class _Fitted:
    """Curves of one ladder, in terms of the quantities in which its runs differ from the full run.

    A quantity that differs but is the same in all runs counts: the prior says how much it may matter.
    """

    def __init__(self, results: Sequence[Result], full: Rung, sizes: Mapping[float, Size], seed: int):
        self.full, self.size = full, sizes[FULL]
        rows = [(each.parameters, each.rung.images, each.rung.steps) for each in results]
        every = np.log(np.array(rows, float) / (self.size.parameters, full.images, full.steps))
        self.varied = [i for i in range(3) if np.any(every[:, i] != 0)]
        self.quantities = [list(NAMES)[i] for i in self.varied]
        self.gain = {0, 2} <= {*self.varied}
        losses = np.array([each.loss for each in results])
        self.curves: Curves = fit_curves(
            every[:, self.varied],
            losses,
            law=Law(len(self.varied), OFFSET_STEPS / full.steps if 2 in self.varied else None, self.gain),
            left_out=longest_runs([each.rung for each in results]),
            draws=DRAWS,
            seed=seed,
        )
        self.recalls = _recalls(results)
        self.captions = max((int(each.recall.get("of", 0)) for each in results), default=0)
        measured = sorted((each.parameters, each.seconds) for each in sizes.values())
        self.measured = np.log(np.array(measured) / (self.size.parameters, self.size.seconds))
        self.generator = np.random.default_rng(seed + 1)

    def at(self, factors: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Return log ratios ``[m k]`` of points given as factors on the quantities of the full run."""
        return np.log(np.array([[each.get(name, 1.0) for name in self.quantities] for each in factors]))

    def seconds(self, model: float = 1.0) -> float:
        """Return the time of a step of a model with this factor on the parameters, by power laws between measured sizes."""
        if len(self.measured) == 1:
            return self.size.seconds * model
        parameters, seconds = self.measured.T
        i = int(np.clip(np.searchsorted(parameters, np.log(model)), 1, len(parameters) - 1))
        exponent = max(0.0, (seconds[i] - seconds[i - 1]) / (parameters[i] - parameters[i - 1]))
        return float(self.size.seconds * np.exp(seconds[i] + exponent * (np.log(model) - parameters[i])))

    def point(self, steps: float) -> Point:
        losses = self.curves.runs(self.at([{"steps": steps / self.full.steps}]), self.generator)
        recall = {}
        for k, curve in self.recalls.items():
            hits = self.generator.binomial(self.captions, curve.recall(losses)[:, 0])
            recall[k] = Band.of(hits / self.captions)
        return Point(round(steps), steps * self.size.seconds / 3600, Band.of(losses[:, 0]), recall)


def make_forecast(
    results: Sequence[Result],
    full: Rung,
    sizes: Mapping[float, Size],
    worthwhile: float = WORTHWHILE,
    seed: int = 0,
) -> Forecast:
    """Derive all answers from the results of a ladder.

    Args:
        results: finished runs.
        full: the full run.
        sizes: measured networks, that of the full run among them.
        worthwhile: relative fall of the loss by twice the steps that is worth them.
        seed: seed of all draws.

    Raises:
        TrainingError: there are too few runs, or they do not differ in their steps.
    """
    if len(results) < FEWEST or len({each.rung.steps for each in results}) < 2:
        raise TrainingError(
            f"the ladder has {len(results)} finished runs, but a forecast needs {FEWEST} with different numbers of steps; give a "
            "larger --budget."
        )
    fitted = _Fitted(results, full, sizes, seed)
    curves = fitted.curves
    expected = np.exp(curves.log_losses(fitted.at([{}])))[:, 0]
    shortest = min(each.rung.steps for each in results)
    grid = np.unique(np.append(np.geomspace(shortest, 4 * full.steps, 24), full.steps))
    return Forecast(
        full=fitted.point(full.steps),
        expected=Band.of(expected),
        levers=_levers(fitted),
        pays_until=_pays_until(fitted, worthwhile),
        models=_models(fitted) if "model" in fitted.quantities else [],
        curve=[fitted.point(steps) for steps in grid],
        inflation=float(curves.inflation),
        noise=float(np.median(curves.noise)),
        exponents={
            name: Band.of(np.exp(curves.draws[:, 1 + len(fitted.quantities) + i]))
            for i, name in enumerate(fitted.quantities)
        },
        floor=Band.of(np.exp(curves.log_floors())),
        gain=Band.of(np.exp(curves.draws[:, -1])) if fitted.gain else None,
    )


def _levers(fitted: _Fitted) -> list[Lever]:
    points = fitted.at([{name: TWICE} for name in fitted.quantities])
    losses = np.exp(fitted.curves.log_losses(points))
    best = losses.argmin(-1)
    hours = fitted.full.steps * fitted.size.seconds / 3600
    factors = {"model": fitted.seconds(TWICE) / fitted.seconds(), "images": 1.0, "steps": TWICE}
    levers = [
        Lever(name, Band.of(losses[:, i]), float((best == i).mean()), hours * factors[name])
        for i, name in enumerate(fitted.quantities)
    ]
    return sorted(levers, key=lambda each: -each.best)


def _pays_until(fitted: _Fitted, worthwhile: float) -> Band | None:
    """Return the band of the steps from which twice the steps are no longer worth it, at most ``FARTHEST`` times the full run.

    None if the runs do not vary the steps.
    """
    if "steps" not in fitted.quantities:
        return None
    factors = np.geomspace(1 / FARTHEST, FARTHEST, 100)
    now, twice = (
        fitted.curves.log_losses(fitted.at([{"steps": factor * each} for each in factors])) for factor in (1, TWICE)
    )
    worth = now - twice >= -np.log1p(-worthwhile)
    after = len(factors) - worth[:, ::-1].argmax(1)  # of the last that is worth it: the first may lie on a plateau
    return Band.of(fitted.full.steps * factors[np.where(worth.any(1), after.clip(max=len(factors) - 1), 0)])


def _models(fitted: _Fitted) -> list[Model]:
    """Return models of several sizes, each trained for as many steps as the time of the full run has."""
    steps = [fitted.seconds() / fitted.seconds(each) for each in MODELS]
    points = fitted.at([{"model": each, "steps": share} for each, share in zip(MODELS, steps, strict=True)])
    losses = np.exp(fitted.curves.log_losses(points))
    return [
        Model(each, round(share * fitted.full.steps), Band.of(losses[:, i]))
        for i, (each, share) in enumerate(zip(MODELS, steps, strict=True))
    ]


def _recalls(results: Sequence[Result]) -> dict[str, RecallCurve]:
    """Return the curve of the recall for each k; none if it was measured in too few runs."""
    measured = [each for each in results if each.recall]
    if len(measured) < FEWEST:
        return {}
    curves = {}
    for k in map(str, RECALLS):
        chance = min(0.99, int(k) / max(int(each.recall["among"]) for each in measured))
        hits, of = ([int(each.recall[name]) for each in measured] for name in (k, "of"))
        curves[k] = fit_recall([each.loss for each in measured], hits, of, chance, DRAWS)
    return curves
