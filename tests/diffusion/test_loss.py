from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.config import from_dict
from ldm.diffusion import DenoisingLossConfig, Diffusion, Parametrization, WeightedLossConfig
from ldm.diffusion.noise_level_samplers import Antithetic, Stratified
from ldm.diffusion.parametrization import X0, Edm, EdmV, Eps, Flow, V
from ldm.diffusion.schedule import Cosine, ScaledLinear
from ldm.diffusion.schedule import Flow as FlowSchedule
from ldm.diffusion.weightings import snr_weight
from ldm.errors import ConfigError

ROWS = [Eps(), V(), X0(), Flow(), Edm(), Edm(sigma_data=1.3), EdmV()]
every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
SIGMA = torch.tensor([0.03, 0.4, 1.0, 3.0, 14.0])


def zero(x: Tensor, noise_level: Tensor, conditioning: None) -> Tensor:
    return torch.zeros_like(x)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_row
@pytest.mark.parametrize("norm", ["l1", "l2", "huber"])
def test_loss_is_the_distance_to_the_target(row: Parametrization, norm: str) -> None:
    x0, noise = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    target = row.target(x0, noise, SIGMA[:, None, None])
    error = torch.randn(5, 3, 4) * 2
    loss, sigma = WeightedLossConfig(norm=norm).build()(  # type: ignore[arg-type]
        lambda x, noise_level, conditioning: target + error,
        Diffusion(ScaledLinear(), row),
        x0,
        None,
        sigma=SIGMA,
        noise=noise,
    )
    by_hand = {
        "l1": error.abs(),
        "l2": error**2,
        "huber": torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5),
    }
    assert torch.equal(sigma, SIGMA)
    torch.testing.assert_close(loss, by_hand[norm].mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_a_network_that_says_nothing_has_the_loss_of_the_variance_of_its_target() -> None:
    x0 = torch.randn(4, 3, 64, 64, generator=generator())
    for row in (Eps(), V(), X0()):  # targets of unit variance, where the data has it
        loss, _ = WeightedLossConfig().build()(zero, Diffusion(ScaledLinear(), row), x0, None, generator(1))
        assert (loss - 1).abs().max() < 5 * math.sqrt(2 / x0[0].numel())


def snr(sigma: float) -> float:
    return 1 / sigma**2


@given(sigma=st.floats(1e-3, 4096), gamma=st.floats(0.1, 20))
def test_min_snr_weights_are_the_papers(sigma: float, gamma: float) -> None:
    r, s = snr(sigma), torch.tensor(sigma, dtype=torch.float64)
    assert snr_weight("min_snr", Eps(), s, gamma).item() == pytest.approx(min(r, gamma) / r)
    assert snr_weight("min_snr", V(), s, gamma).item() == pytest.approx(min(r, gamma) / (r + 1))
    assert snr_weight("min_snr", X0(), s, gamma).item() == pytest.approx(min(r, gamma))
    assert snr_weight("min_snr", Edm(sigma_data=1.0), s, gamma).item() == pytest.approx(min(r, gamma) / (r + 1))


@given(sigma=st.floats(1e-3, 4096), gamma=st.floats(0.1, 20))
def test_soft_min_snr_is_the_harmonic_sum_of_snr_and_gamma(sigma: float, gamma: float) -> None:
    """1 / (s^2 + 1 / gamma) on the error of x0: below both, and close to the smaller one where they differ."""
    s = torch.tensor(sigma, dtype=torch.float64)
    soft, hard = (snr_weight(name, X0(), s, gamma).item() for name in ("soft_min_snr", "min_snr"))
    assert soft == pytest.approx(1 / (sigma**2 + 1 / gamma))
    assert hard / 2 <= soft <= hard
    assert snr_weight("soft_min_snr", Eps(), s, gamma).item() == pytest.approx(gamma / (snr(sigma) + gamma))


@pytest.mark.parametrize("row", [row for row in ROWS if row != Flow()], ids=repr)
@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr"])
def test_min_snr_weighs_the_error_of_x0_alike_in_every_parametrization(row: Parametrization, weighting: str) -> None:
    gamma, diffusion = 5.0, Diffusion(ScaledLinear(), row)
    d = row.sigma_data
    x0, noise = (torch.randn(5, 3, 4, dtype=torch.float64) for _ in range(2))
    sigma = SIGMA.double()
    answer = torch.randn(5, 3, 4, dtype=torch.float64)
    loss, _ = WeightedLossConfig(weighting=weighting, gamma=gamma).build()(
        lambda x, noise_level, conditioning: answer, diffusion, x0, None, sigma=sigma, noise=noise
    )
    x = x0 + sigma[:, None, None] * noise
    error = diffusion.denoise(lambda x, noise_level, conditioning: answer, x, sigma, None) - x0
    ratio = (d / sigma) ** 2
    limited = torch.minimum(ratio, torch.tensor(gamma)) if weighting == "min_snr" else 1 / (1 / ratio + 1 / gamma)
    weight = limited / d**2
    torch.testing.assert_close(loss, weight * (error**2).mean((1, 2)))


def test_loss_depends_on_its_generator_alone() -> None:
    x0, diffusion = torch.randn(6, 3, 4), Diffusion(ScaledLinear(), V())
    state = torch.get_rng_state()
    loss = WeightedLossConfig(noise_level_sampler=Antithetic()).build()
    first, again, other = (loss(zero, diffusion, x0, None, generator(seed)) for seed in (2, 2, 3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_levels_are_drawn_as_configured_and_noise_after_them() -> None:
    x0, diffusion, draw = torch.zeros(7, 3), Diffusion(ScaledLinear(), Eps()), Stratified()
    seen = []
    _, sigma = WeightedLossConfig(noise_level_sampler=draw).build()(
        lambda x, noise_level, conditioning: seen.append(x) or x, diffusion, x0, None, generator(4)
    )
    expected = generator(4)
    assert torch.equal(sigma, draw.sample(7, diffusion.schedule, expected))
    noise = torch.randn(7, 3, generator=expected)
    torch.testing.assert_close(seen[0], sigma[:, None] * noise / (1 + sigma[:, None] ** 2).sqrt())


def test_gradients_reach_the_network_also_from_low_precision() -> None:
    network = nn.Linear(3, 3).bfloat16()
    loss, _ = WeightedLossConfig().build()(
        lambda x, noise_level, conditioning: network(x.bfloat16()),
        Diffusion(ScaledLinear(), V()),
        torch.randn(8, 3),
        None,
        generator(),
    )
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.abs().sum() > 0


def test_an_optimal_network_learns_a_gaussian() -> None:
    """The minimum of the loss is the mean of the noise given x: of data N(0, d^2), s x / (s^2 + d^2)."""
    d, sigma = 0.5, 0.8
    x0 = torch.randn(200_000, 1, generator=generator()) * d
    coefficient = torch.zeros((), requires_grad=True)
    loss, _ = WeightedLossConfig().build()(
        lambda x, noise_level, conditioning: coefficient * x,
        Diffusion(ScaledLinear(), Eps()),
        x0,
        None,
        generator(1),
        sigma=torch.full((len(x0),), sigma),
    )
    # The loss (c inp x - n)^2 is quadratic in c, so that its minimum is at -slope / curvature.
    [slope] = torch.autograd.grad(loss.mean(), coefficient)
    curvature = 2 * (d**2 + sigma**2) / (1 + sigma**2)
    assert -slope.item() / curvature == pytest.approx(sigma * math.sqrt(1 + sigma**2) / (sigma**2 + d**2), rel=0.01)


def test_gamma_is_positive() -> None:
    with pytest.raises(ConfigError, match="gamma"):
        from_dict(WeightedLossConfig, {"weighting": "min_snr", "gamma": 0})


def oracle(sigmas: list[Tensor]) -> object:
    """A network that returns the noise in its input, if x0 is 0, and keeps what it returned."""

    def network(x: Tensor, noise_level: Tensor, conditioning: None) -> Tensor:
        sigma = ScaledLinear().sigma(noise_level.double()).to(x)[:, None, None, None]
        sigmas.append(x * (1 + sigma**2).sqrt() / sigma)
        return sigmas[-1]

    return network


def test_offset_noise_is_equal_in_a_channel_and_part_of_the_target() -> None:
    """The variance of its mean over n positions is o^2 + 1 / n; the network that finds the noise has no loss."""
    seen: list[Tensor] = []
    loss = WeightedLossConfig(offset_noise=0.5).build()
    value, _ = loss(oracle(seen), Diffusion(ScaledLinear(), Eps()), torch.zeros(512, 4, 6, 6), None, generator())  # type: ignore[arg-type]
    assert value.max() < 1e-4
    assert seen[0].mean((2, 3)).var().item() == pytest.approx(0.25 + 1 / 36, rel=0.1)
    assert seen[0].var((2, 3)).mean().item() == pytest.approx(1, rel=0.05)
    between = torch.corrcoef(seen[0].mean((2, 3)).mT)  # each channel of an image has an offset of its own
    assert (between - torch.eye(4)).abs().max() < 0.2


def test_input_perturbation_is_in_the_input_but_not_in_the_target() -> None:
    """The network that finds all of the noise is wrong by the perturbation, of variance p^2."""
    seen: list[Tensor] = []
    loss = WeightedLossConfig(input_perturbation=0.3).build()
    value, _ = loss(oracle(seen), Diffusion(ScaledLinear(), Eps()), torch.zeros(64, 4, 8, 8), None, generator())  # type: ignore[arg-type]
    assert value.mean().item() == pytest.approx(0.09, rel=0.05)
    assert seen[0].var().item() == pytest.approx(1.09, rel=0.05)


def test_a_fixed_noise_is_neither_offset_nor_perturbed() -> None:
    x0, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    ends = [
        config.build()(zero, Diffusion(ScaledLinear(), V()), x0, None, sigma=SIGMA, noise=noise)[0]
        for config in (WeightedLossConfig(), WeightedLossConfig(offset_noise=0.5, input_perturbation=0.5))
    ]
    assert torch.equal(*ends)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (8, 32)])
def test_levels_shift_with_the_resolution(height: int, width: int) -> None:
    """Esser et al., eq. 23: u_m = sqrt(m / n) u_n / (1 + (sqrt(m / n) - 1) u_n), for m positions in place of n."""
    diffusion, x0 = Diffusion(FlowSchedule(), Flow()), torch.zeros(64, 2, height, width)
    levels = [
        WeightedLossConfig(base_resolution=base).build()(zero, diffusion, x0, None, generator())[1].double()
        for base in (None, 8)
    ]
    u_n, u_m = (sigma / (1 + sigma) for sigma in levels)
    ratio = math.sqrt(height * width / 64)
    torch.testing.assert_close(
        u_m, ratio * u_n / (1 + (ratio - 1) * u_n), rtol=1e-5, atol=3e-4
    )  # pure noise is at 1 - 1/4096


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"weighting": "min_snr"}, "min_snr cannot be used with zero_terminal_snr"),
        ({"kind": "uncertainty", "weighting": "soft_min_snr"}, "soft_min_snr cannot be used with zero_terminal_snr"),
        ({"noise_level_sampler": "lognormal"}, "lognormal cannot be used with zero_terminal_snr"),
        (
            {"noise_level_sampler": {"kind": "low_discrepancy", "distribution": "logit_normal"}},
            "low_discrepancy cannot be used with zero_terminal_snr",
        ),
        ({"base_resolution": 16}, "base_resolution cannot be used with zero_terminal_snr"),
        ({"kind": "contrastive_flow"}, "contrastive_flow cannot be used with the parametrization v"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(loss: dict[str, object], message: str) -> None:
    config = from_dict(DenoisingLossConfig, loss)
    with pytest.raises(ConfigError, match=message):
        config.check(Diffusion(Cosine(zero_terminal_snr=True), V()))


@pytest.mark.parametrize("kind", ["weighted", "uncertainty", "contrastive_flow", "dispersive", "repa"])
@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr"])
def test_weightings_by_snr_are_refused_for_flow_matching(kind: str, weighting: str) -> None:
    config = from_dict(DenoisingLossConfig, {"kind": kind, "weighting": weighting})
    with pytest.raises(ConfigError, match=f"{weighting} cannot be used with the parametrization flow"):
        config.check(Diffusion(FlowSchedule(), Flow()))


@pytest.mark.parametrize(
    "values",
    [{"base_resolution": 0}, {"offset_noise": -0.1}, {"input_perturbation": math.inf}],
)
def test_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        from_dict(WeightedLossConfig, values)
