from __future__ import annotations

import numpy as np
import pytest

from ldm.forecast.bands import PLATEAU_FALL, Band, fall_factors, fit_curves
from ldm.forecast.curves import Law, fit, log_loss, log_loss_and_gradient, plateau_share, prior_of
from tests.forecast.ladders import LAST, LONGEST, full_losses, population, simulate

WIDE = [(n, d, s) for n in (1, 1e-1, 1e-2, 1e-3) for d in (1, 1e-1, 1e-2, 1e-3) for s in (1, 1e-1, 1e-2, 1e-3)]


@pytest.mark.parametrize("extra", [(), ((-3.0, 0.0, 2.0),), ((-3.0, 0.0, 2.0), (-2.0, -1.0, 0.3))])
def test_the_gradient_is_that_of_the_curve(extra: tuple[tuple[float, ...], ...]) -> None:
    """Also with an offset, and with an offset and a gain."""
    parameters, log_ratios = population(3, 0), np.random.default_rng(0).uniform(-4, 0, (5, 3))
    parameters = np.c_[(parameters, *map(np.array, extra))]
    _, gradient = log_loss_and_gradient(parameters, log_ratios)
    for i in range(parameters.shape[1]):
        step = np.zeros(parameters.shape[1])
        step[i] = 1e-6
        difference = log_loss(parameters + step, log_ratios) - log_loss(parameters - step, log_ratios)
        np.testing.assert_allclose(gradient[..., i], difference / 2e-6, rtol=1e-4, atol=1e-7)


def test_known_parameters_are_recovered_from_runs_of_many_sizes() -> None:
    """Exponents and floor of Hoffmann et al. 2022, arXiv 2203.15556, eq. 10, as far as they have a name there."""
    truth = np.log([[0.35, 0.02, 0.03, 0.025, 0.34, 0.28, 0.4]])
    ladder = simulate(truth, 0.003, seed=0, runs=WIDE)
    curves = fit_curves(ladder.log_ratios, ladder.losses, draws=50)
    np.testing.assert_allclose(np.exp(curves.best[0, 4:]), np.exp(truth[0, 4:]), rtol=0.06)
    np.testing.assert_allclose(np.exp(curves.best[0, 0]), 0.35, rtol=0.03)
    low, high = np.quantile(curves.draws[0], [0.005, 0.995], axis=0)
    assert ((low < truth[0]) & (truth[0] < high)).all()


def test_bands_cover_the_full_run_as_often_as_they_say() -> None:
    """The longest run of each of the 200 ladders has an eighth of the steps of the full run."""
    seed = 1
    ladder = simulate(population(200, seed), 0.01, seed)
    curves = fit_curves(ladder.log_ratios, ladder.losses, left_out=LONGEST, draws=60)
    generator = np.random.default_rng(seed)
    low, high = np.quantile(curves.runs(np.zeros((1, 3)), generator)[..., 0], [0.1, 0.9], axis=1)
    full = full_losses(ladder, 0.01, seed)
    covered = ((low < full) & (full < high)).mean()
    assert 0.7 <= covered <= 0.9, covered
    # They are of use: the last run's loss is farther from the full run's than the middle of the band, mostly.
    middle = np.sqrt(low * high)
    assert (np.abs(np.log(middle / full)) < np.abs(np.log(ladder.losses.min(-1) / full))).mean() > 0.75


@pytest.mark.parametrize("plateau_fall", [1.0, PLATEAU_FALL])
@pytest.mark.parametrize("offset", [LAST / 20, LAST / 2, 2 * LAST])
def test_bands_cover_the_full_run_after_a_plateau(offset: float, plateau_fall: float) -> None:
    """Also if the longest run has mostly not left it. Offsets and gains are those of the prior, around ``offset``.

    The loss falls as fast as the curve after the plateau, or faster.
    """
    seed, count = 2, 100
    offsets, gains = np.random.default_rng(seed).standard_normal((2, count))
    offsets, gains = np.log(offset) + 1.5 * offsets, np.log(0.1) + 1.5 * gains
    ladder = simulate(np.c_[population(count, seed), offsets, gains], 0.01, seed)
    curves = fit_curves(ladder.log_ratios, ladder.losses, law=Law(3, offset, gain=True), left_out=LONGEST, draws=60)
    full = full_losses(ladder, 0.01, seed, plateau_fall)
    low, high = np.quantile(curves.runs(np.zeros((1, 3)), np.random.default_rng(0))[..., 0], [0.1, 0.9], axis=1)
    covered = ((low < full) & (full < high)).mean()
    assert 0.7 <= covered <= 0.92, covered


def test_the_term_of_the_steps_is_flat_before_its_offset_and_a_power_law_after() -> None:
    parameters = np.log([[1e-9, 0.1, 0.5, 0.02]])  # floor, term, exponent, offset
    steps = np.log([[1e-6], [1e-5], [1.0], [1e4], [4e4]])
    losses = log_loss(parameters, steps)[0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0] == pytest.approx(np.log(0.1 * (1.02 / 0.02) ** 0.5), abs=1e-3)
    assert losses[2] == pytest.approx(np.log(0.1))
    assert losses[4] - losses[3] == pytest.approx(-0.5 * np.log(4), abs=1e-3)


@pytest.mark.parametrize(("run", "limit"), [(5, 0.02), (7, 0.06)])
def test_one_diverged_run_hardly_moves_the_forecast(run: int, limit: float) -> None:
    """One that is repeated with another seed, and one of the two of full width."""
    ladder = simulate(population(20, 5), 0.005, seed=5)
    broken = ladder.losses.copy()
    broken[:, run] *= 1.5
    medians = []
    for losses in (ladder.losses, broken):
        curves = fit_curves(ladder.log_ratios, losses, left_out=LONGEST, draws=200)
        medians.append(np.median(np.exp(curves.log_losses(np.zeros((1, 3))))[..., 0], axis=1))
    assert np.abs(np.log(medians[1] / medians[0])).mean() < limit


def test_a_curve_that_is_no_power_law_has_wider_bands() -> None:
    """The model error is seen by forecasting the longest runs from the others."""
    ladder = simulate(population(20, 6), 0.003, seed=6)
    bent = ladder.losses.copy()
    bent[:, LONGEST] *= 1.15
    straight, other = (
        fit_curves(ladder.log_ratios, losses, left_out=LONGEST, draws=60) for losses in (ladder.losses, bent)
    )
    assert straight.inflation.mean() < 1.4
    assert other.inflation.mean() > 2


def test_more_noise_gives_wider_bands_and_the_noise_is_estimated() -> None:
    widths, bands = [], []
    for noise in (0.003, 0.03):
        ladder = simulate(population(40, 7), noise, seed=7)
        curves = fit_curves(ladder.log_ratios, ladder.losses, left_out=LONGEST, draws=60)
        assert 0.4 < np.median(curves.noise) / noise < 2
        low, high = np.quantile(log_loss(curves.draws, np.zeros((1, 3)))[..., 0], [0.1, 0.9], axis=1)
        widths.append(np.median(high - low))
        low, high = np.quantile(curves.runs(np.zeros((1, 3)), np.random.default_rng(0))[..., 0], [0.1, 0.9], axis=1)
        bands.append(np.median(np.log(high / low)))
    assert widths[1] > 2 * widths[0]
    assert bands[1] > 1.2 * bands[0]  # a part of a band does not depend on the noise


def test_a_ladder_fits_alike_alone_and_among_others() -> None:
    ladder = simulate(population(8, 8), 0.01, seed=8)
    logs = np.log(ladder.losses)
    together = fit(ladder.log_ratios, logs, prior_of(ladder.losses.min(-1), Law(3)), np.full(8, 0.01))
    alone = fit(ladder.log_ratios, logs[3:4], prior_of(ladder.losses[3:4].min(-1), Law(3)), np.full(1, 0.01))
    np.testing.assert_allclose(together[3], alone[0], atol=1e-9)


def test_only_what_lies_below_all_runs_has_the_factor() -> None:
    ladder = simulate(population(3, 9), 0.005, seed=9)
    curves = fit_curves(ladder.log_ratios, ladder.losses, draws=20)
    points = np.log([[1, 1, 1e-3], [1, 1, 1.0]])
    plain, found = log_loss(curves.draws, points), curves.log_losses(points)
    assert (plain[..., 0] > curves.lowest[:, None]).all()
    np.testing.assert_allclose(found[..., 0], plain[..., 0], rtol=1e-12)
    fall = plain[..., 1] - curves.lowest[:, None]
    np.testing.assert_allclose(
        found[..., 1], np.where(fall < 0, curves.lowest[:, None] + curves.factor * fall, plain[..., 1])
    )
    assert (fall < 0).mean() > 0.9
    assert np.std(np.log(curves.factor)) == pytest.approx(0.35, rel=0.3)


def test_the_fall_after_the_plateau_counts_for_more_as_far_as_the_runs_are_on_it() -> None:
    generator = np.random.default_rng(0)
    ladder = simulate(np.c_[population(20, 10), np.full(20, np.log(0.01)), np.full(20, np.log(0.1))], 0.005, seed=10)
    medians = {}
    for offset in (1e-6, 1e3):
        parameters = np.c_[ladder.parameters[:, :-2], np.full(20, np.log(offset)), ladder.parameters[:, -1]]
        draws = np.repeat(parameters[:, None], 400, axis=1)
        medians[offset] = np.median(fall_factors(draws, ladder.log_ratios, generator))
    assert medians[1e-6] == pytest.approx(1, abs=0.05)
    assert medians[1e3] == pytest.approx(PLATEAU_FALL, abs=0.1)
    assert (plateau_share(ladder.parameters[:, :-2], ladder.log_ratios) == 0).all()  # curves without an offset


def test_a_band_has_four_fifths_of_the_draws() -> None:
    band = Band.of(np.arange(1001) / 1000)
    assert (band.low, band.median, band.high) == pytest.approx((0.1, 0.5, 0.9))
