from __future__ import annotations

import math

import pytest
import torch

from ldm.config import from_dict
from ldm.diffusion.noise_level_samplers import (
    Antithetic,
    LogitNormal,
    LogNormal,
    LowDiscrepancy,
    NoiseLevelSampler,
    Stratified,
    Uniform,
)
from ldm.diffusion.schedule import Cosine, Flow, Karras, ScaledLinear
from ldm.errors import ConfigError
from ldm.nn.ranks import BatchGenerator, draw_rows

SAMPLERS = [
    Uniform(),
    Antithetic(),
    Stratified(),
    LogNormal(),
    LogitNormal(),
    LowDiscrepancy(),
    LowDiscrepancy(LogNormal()),
]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_timesteps(sampler: NoiseLevelSampler, n: int, num_timesteps: int, seed: int = 0) -> torch.Tensor:
    schedule = Cosine(num_timesteps=num_timesteps)
    t = schedule.t(sampler.sample(n, schedule, generator(seed)).double())
    torch.testing.assert_close(t, t.round(), atol=1e-3, rtol=0)
    return t.round().long()


@every_sampler
def test_samples_depend_on_the_generator_alone(sampler: NoiseLevelSampler) -> None:
    state = torch.get_rng_state()
    first, again, other = (sampler.sample(9, ScaledLinear(), generator(seed)) for seed in (3, 3, 4))
    assert first.shape == (9,)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@every_sampler
def test_samples_stay_within_the_schedule(sampler: NoiseLevelSampler) -> None:
    schedule = ScaledLinear(beta_start=0.1, beta_end=0.2, num_timesteps=5)
    sigma = sampler.sample(2000, schedule, generator())
    assert sigma.min() == torch.tensor(schedule.sigma_min)
    assert sigma.max() == torch.tensor(schedule.sigma_max)


@pytest.mark.parametrize("sampler", [Uniform(), Antithetic(), Stratified(), LowDiscrepancy()], ids=repr)
def test_timesteps_are_equally_likely(sampler: NoiseLevelSampler) -> None:
    n, bins = 20_000, 10
    counts = drawn_timesteps(sampler, n, bins).bincount(minlength=bins).double()
    chi_squared = ((counts - n / bins) ** 2 / (n / bins)).sum()
    assert chi_squared < 50  # 9 degrees of freedom, 18 where pairs make each sampler count twice


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_antithetic_pairs_add_up(n: int) -> None:
    t = drawn_timesteps(Antithetic(), n, 100)
    half = (n + 1) // 2
    assert torch.equal(t[half:], 99 - t[: n - half])


@pytest.mark.parametrize("n", [1, 4, 10])
def test_stratified_samples_one_of_each_stratum(n: int) -> None:
    for seed in range(20):
        t = drawn_timesteps(Stratified(), n, 100, seed)
        assert torch.equal(t * n // 100, torch.arange(n))


def test_lognormal_has_its_mean_and_deviation() -> None:
    n, sampler = 40_000, LogNormal(mean=-0.7, std=0.9)
    logarithm = sampler.sample(n, Karras(sigma_min=1e-5, sigma_max=4000), generator()).double().log()
    assert abs(logarithm.mean() + 0.7) < 4 * 0.9 / math.sqrt(n)
    assert abs(logarithm.std() - 0.9) < 4 * 0.9 / math.sqrt(2 * n)


@pytest.mark.parametrize("sampler", [LogNormal(mean=0.0, std=1.0), LogitNormal()], ids=repr)
def test_lognormal_with_flow_is_logit_normal(sampler: NoiseLevelSampler) -> None:
    sigma = sampler.sample(40_000, Flow(), generator()).double()
    u = sigma / (1 + sigma)
    # The logistic function of N(0, 1) has the median 1/2 and its quartiles at the logistic of -+0.6745.
    quartiles = torch.quantile(u, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(
        quartiles, torch.tensor([-0.6745, 0, 0.6745], dtype=torch.float64).sigmoid(), atol=0.006, rtol=0
    )


@pytest.mark.parametrize(
    ("sampler", "factor"),
    [(Uniform(), 3), (LogitNormal(), 3), (LowDiscrepancy(LogitNormal(0.5, 0.7)), 3), (LogNormal(0.2), 1)],
    ids=repr,
)
def test_the_shift_of_a_schedule_multiplies_its_levels_but_not_absolute_ones(
    sampler: NoiseLevelSampler, factor: float
) -> None:
    plain, shifted = (sampler.sample(1001, Flow(shift=shift), generator()) for shift in (1.0, 3.0))
    torch.testing.assert_close(shifted.median(), factor * plain.median())


@pytest.mark.parametrize("distribution", [LogNormal(mean=0.3, std=0.8), LogitNormal()], ids=repr)
@pytest.mark.parametrize("n", [1, 8, 33])
def test_low_discrepancy_has_equidistant_shares_in_random_order(distribution: LogNormal, n: int) -> None:
    """(i + offset) / n of the distribution, for all i; each sample by itself has the distribution."""
    schedule, sampler = Karras(sigma_min=1e-5, sigma_max=4000), LowDiscrepancy(distribution)
    batches = [sampler.sample(n, schedule, generator(seed)).double() for seed in range(200)]
    for batch in batches:
        share = torch.special.ndtr((batch.sort().values.log() - distribution.mean) / distribution.std)
        offsets = share * n - torch.arange(n)
        torch.testing.assert_close(offsets, offsets[:1].expand(n), rtol=0, atol=1e-4)
        assert 0 <= offsets[0] <= 1
    first = torch.stack([batch[0] for batch in batches]).log()
    assert abs(first.mean() - distribution.mean) < 4 * distribution.std / math.sqrt(200)
    assert n == 1 or any(not torch.equal(batch, batch.sort().values) for batch in batches)


def test_low_discrepancy_is_that_of_the_batch_of_all_ranks() -> None:
    def rows(start: int, count: int) -> torch.Tensor:
        source = BatchGenerator("cpu")
        source.manual_seed(5)
        source.start, source.total = start, 8
        return draw_rows(lambda n: LowDiscrepancy().sample(n, Cosine(), source), count, source)

    assert torch.equal(torch.cat([rows(0, 4), rows(4, 4)]), rows(0, 8))


@pytest.mark.parametrize("kind", ["antithetic", "stratified", "low_discrepancy"])
def test_low_discrepancy_needs_a_distribution_of_independent_samples(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"low_discrepancy cannot have the distribution {kind}"):
        from_dict(NoiseLevelSampler, {"kind": "low_discrepancy", "distribution": kind})
