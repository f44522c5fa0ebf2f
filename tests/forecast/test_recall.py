from __future__ import annotations

import numpy as np

from ldm.forecast.recall import fit_recall

LOSSES = np.linspace(0.60, 0.42, 10)


def true_recall(loss: np.ndarray, u: float, v: float, chance: float) -> np.ndarray:
    result: np.ndarray = chance + (1 - chance) / (1 + np.exp(-(u - v * np.log(loss))))
    return result


def test_the_recall_of_a_lower_loss_is_covered_by_its_band() -> None:
    """In 200 ladders of ten runs whose losses are known, forecast at a loss beyond those of the runs."""
    generator, covered, errors = np.random.default_rng(0), [], []
    for _ in range(200):
        v, half = generator.uniform(8, 20), generator.uniform(0.35, 0.45)  # R = 1/2 at this loss
        u, chance, count = v * np.log(half), 5 / 3600, 192
        hits = generator.binomial(count, true_recall(LOSSES, u, v, chance))
        curve = fit_recall(LOSSES, hits, [count] * 10, chance, 400)
        truth = generator.binomial(count, true_recall(np.array([0.38]), u, v, chance))[0] / count
        expected = curve.recall(np.full((400, 1), 0.38))[:, 0]
        measured = generator.binomial(count, expected) / count
        low, high = np.quantile(measured, [0.1, 0.9])
        covered.append(low <= truth <= high)
        errors.append(abs(np.median(expected) - truth))
    assert 0.7 <= np.mean(covered) <= 0.92, np.mean(covered)
    assert np.median(errors) < 0.08


def test_recall_stays_between_chance_and_one() -> None:
    curve = fit_recall(LOSSES, np.arange(10) * 10, [100] * 10, 0.05, 100)
    recall = curve.recall(np.geomspace(1e-3, 10, 50)[None].repeat(100, 0))
    assert (recall >= 0.05 - 1e-12).all()
    assert (recall <= 1).all()
    assert (np.median(recall, 0)[:-1] >= np.median(recall, 0)[1:]).all()  # a lower loss recognises more


def test_runs_that_are_all_at_chance_give_a_wide_band() -> None:
    curve = fit_recall(LOSSES, [0] * 10, [100] * 10, 0.01, 400)
    low, high = np.quantile(curve.recall(np.full((400, 1), 0.2)), [0.1, 0.9])
    assert low < 0.15
    assert high > low + 0.1
