from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.diffusion import SAMPLERS, SPECS, Denoiser, Diffusion, Noise, Step, seeded_noise, sigmas
from ldm.diffusion.parametrization import X0, Edm, Eps, V
from ldm.diffusion.parametrization import Flow as Velocity
from ldm.diffusion.samplers import ddim, ddpm, euler, euler_ancestral
from ldm.diffusion.schedule import Cosine, Flow, Karras, ScaledLinear, Schedule, interpolate, karras_levels

MEAN, STD = 0.3, 0.5


def gaussian(mean: float, std: float) -> Denoiser:
    """The exact denoiser of data that is N(mean, std^2) in each coordinate."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2
        return (variance * mean + std**2 * x) / (variance + std**2)

    return denoise


def path_noise(draw: Callable[[], Tensor]) -> Noise:
    """Noise of a Brownian path over the levels, which are asked for in falling order; each ``draw`` is white."""
    walked: dict[float, Tensor] = {}

    def noise(s: float, s_next: float) -> Tensor:
        lowest = min([s, *walked])
        if s_next not in walked:
            walked[s_next] = walked.get(lowest, torch.zeros(())) + math.sqrt(lowest - s_next) * draw()
        return (walked[s_next] - walked.get(s, torch.zeros(()))) / math.sqrt(s - s_next)

    return noise


def run(name: str, denoise: Denoiser, x: Tensor, grid: Tensor, seed: int = 0, **options: object) -> list[Step]:
    if SPECS[name].stochastic:
        options["noise"] = unit_noise(x, seed) if not SPECS[name].brownian else path_noise(draws(x, seed))
    return list(SAMPLERS[name](denoise, x, grid, **options))


def draws(x: Tensor, seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def unit_noise(x: Tensor, seed: int = 5) -> Noise:
    draw = draws(x, seed)
    return lambda s, s_next: draw()


every_sampler = pytest.mark.parametrize("name", SAMPLERS)
on_the_grid = pytest.mark.parametrize("name", [name for name in SAMPLERS if not SPECS[name].adaptive])
stochastic = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler_ancestral", {}),
        ("euler_ancestral", {"eta": 0.4}),
        ("ddim", {"eta": 0.6}),
        ("ddpm", {"variance": "small"}),
        ("ddpm", {"variance": "large"}),
        ("dpm2_ancestral", {}),
        ("dpmpp_2s_ancestral", {}),
        ("dpmpp_sde", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_3m_sde", {}),
    ],
    ids=str,
)


def fitted_order(errors: list[float]) -> float:
    """The least-squares slope of ln error against ln n, where each of five n is twice the one before."""
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    return sum(weight * slope for weight, slope in zip((4, 6, 6, 4), slopes, strict=True)) / 20


DETERMINISTIC = {name: {} for name, spec in SPECS.items() if not spec.stochastic and not spec.adaptive} | {
    "ddim": {"eta": 0.0},
    "dpm2_ancestral": {"eta": 0.0},
    "dpmpp_2s_ancestral": {"eta": 0.0},
    "dpmpp_2m_sde": {"eta": 0.0},
    "dpmpp_3m_sde": {"eta": 0.0},
}
"""What makes each solver one of the probability flow."""


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize(("sigma_max", "sigma_min", "slack"), [(80.0, 0.002, 0.15), (14.6, 0.03, 0.2)])
def test_order_of_convergence_on_a_gaussian(name: str, sigma_max: float, sigma_min: float, slack: float) -> None:
    x = torch.tensor([[-1.5], [0.4], [1.0]], dtype=torch.float64) * sigma_max
    # The probability flow keeps each point's quantile: it maps N(mean, std^2 + s^2) to N(mean, std^2 + s'^2).
    exact = MEAN + (x - MEAN) * math.sqrt((STD**2 + sigma_min**2) / (STD**2 + sigma_max**2))
    counts = [16, 32, 64, 128, 256]
    errors = []
    for n in counts:
        grid = karras_levels(sigma_max, sigma_min, 7.0, n + 1)
        steps = run(name, gaussian(MEAN, STD), x, grid, **DETERMINISTIC[name])
        errors.append((steps[-1].x - exact).abs().max().item())
    assert fitted_order(errors) > SPECS[name].order - slack, f"errors {errors} at {counts} steps"


@every_sampler
@pytest.mark.parametrize("schedule", [ScaledLinear(zero_terminal_snr=True), Cosine(), Flow()], ids=lambda s: s.kind)
@pytest.mark.parametrize("n", [5, 10, 30])
def test_every_solver_can_begin_at_pure_noise(name: str, schedule: Schedule, n: int) -> None:
    """Where the first level is thousands of times the second: the sample is still one of the data, if a coarse one."""
    grid = sigmas(schedule, n)
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)) * grid[0]
    last = run(name, gaussian(MEAN, STD), x, grid)[-1].x
    assert grid[0] > 500 * grid[1] / n
    assert abs(last.mean() - MEAN) < 0.1
    assert 0.5 < last.std() / STD < 1.4 or name == "lcm"


@every_sampler
@pytest.mark.parametrize(
    "diffusion",
    [
        Diffusion(ScaledLinear(), Eps()),
        Diffusion(ScaledLinear(zero_terminal_snr=True), V()),
        Diffusion(Cosine(), X0()),
        Diffusion(Flow(), Velocity()),
        Diffusion(Karras(), Edm()),
    ],
    ids=lambda diffusion: f"{diffusion.parametrization.kind}-{diffusion.schedule.kind}",
)
def test_every_solver_samples_with_every_parametrization(name: str, diffusion: Diffusion) -> None:
    """The network knows the data, and the noise level by what it is told of it alone."""
    table = diffusion.schedule.table.double()
    told = diffusion.parametrization.noise_level(table, diffusion.schedule)

    def network(scaled: Tensor, noise_level: Tensor, _: None) -> Tensor:
        sigma = interpolate(noise_level, told, table.log()).exp().to(scaled)[:, None]
        skip, out, inp = diffusion.parametrization.scalings(sigma)
        x = scaled / inp
        return (gaussian(MEAN, STD)(x, sigma[:, 0]) - skip * x) / out

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return diffusion.denoise(network, x, sigma, None)

    grid = sigmas(diffusion.schedule, 15)
    x = diffusion.start(torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)), grid[0].item())
    last = run(name, denoise, x, grid)[-1].x
    assert abs(last.mean() - MEAN) < 0.1
    assert 0.6 < last.std() / STD < 1.4 or name == "lcm"


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("plms", "lms", "dpm_adaptive")])
def test_a_step_to_0_ends_at_the_denoised_picture(name: str) -> None:
    steps = run(name, gaussian(MEAN, STD), torch.randn(4, 3) * 15, sigmas(ScaledLinear(), 7))
    torch.testing.assert_close(steps[-1].x, steps[-1].denoised, rtol=0, atol=1e-6)


@on_the_grid
def test_steps_say_where_they_are_and_leave_their_input_alone(name: str) -> None:
    grid, x = sigmas(ScaledLinear(), 5), torch.randn(4, 3) * 15
    before = x.clone()
    steps = run(name, gaussian(MEAN, STD), x, grid)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert [step.sigma for step in steps] == grid[1:].tolist()
    assert torch.equal(x, before)
    torch.testing.assert_close(steps[0].denoised, gaussian(MEAN, STD)(x, grid[0].expand(4)))


@every_sampler
def test_evaluations_are_as_specified_and_never_at_0(name: str) -> None:
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return gaussian(MEAN, STD)(x, sigma)

    x = torch.randn(4, 3)
    for n in (6, 9):
        steps = run(name, denoise, x, sigmas(ScaledLinear(), n))
    assert all(sigma.shape == (4,) and (sigma > 0).all() for sigma in seen)
    if SPECS[name].adaptive:
        seen.clear()
        steps = run(name, denoise, x, torch.tensor([9.0, 0.1]))
        assert len(seen) == SPECS[name].evaluations * len(steps)
    else:
        few = run_and_count(name, 6)
        assert run_and_count(name, 9) - few == SPECS[name].evaluations * 3  # the first and the last step may differ


def run_and_count(name: str, n: int) -> int:
    count = 0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return gaussian(MEAN, STD)(x, sigma)

    run(name, denoise, torch.randn(4, 3), sigmas(ScaledLinear(), n))
    return count


@every_sampler
def test_nothing_is_drawn_from_the_global_generator(name: str) -> None:
    state = torch.get_rng_state()
    run(name, gaussian(MEAN, STD), torch.zeros(4, 3), sigmas(ScaledLinear(), 5))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_table_of_samplers_tells_what_they_take() -> None:
    assert SPECS.keys() == SAMPLERS.keys()
    assert {name for name, spec in SPECS.items() if not spec.stochastic} == {
        *("euler", "heun", "dpm2", "plms", "lms", "deis", "dpmpp_2m", "unipc", "dpm_adaptive")
    }
    assert {name for name, spec in SPECS.items() if spec.brownian} == {"dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"}
    assert SPECS["ddim"].options == ("eta",)
    assert SPECS["dpm_adaptive"].options == ("rtol", "atol", "h_init")
    assert SPECS["ddpm"].options == ("variance",)
    assert SPECS["heun"].options == ()


def network_like(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that is no Gaussian's: nothing cancels by chance."""
    return torch.tanh(x + x.roll(1, -1) / (1 + sigma[:, None])) * torch.cos(sigma.log())[:, None]


GRIDS = [
    sigmas(ScaledLinear(), 20),
    sigmas(ScaledLinear(), 20, "leading", 1, "sigma_min"),
    sigmas(Karras(), 9),
]


@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_is_euler(grid: Tensor) -> None:
    x = torch.randn(5, 6, dtype=torch.float64) * grid[0]
    for a, b in zip(ddim(network_like, x, grid, unit_noise(x)), euler(network_like, x, grid), strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_ddpm_of_small_variance_is_euler_ancestral(grid: Tensor) -> None:
    x = torch.randn(5, 6, dtype=torch.float64) * grid[0]
    by_posterior = ddpm(network_like, x, grid, unit_noise(x))
    by_renoising = euler_ancestral(network_like, x, grid, unit_noise(x))
    by_eta = ddim(network_like, x, grid, unit_noise(x), eta=1.0)
    for a, b, c in zip(by_posterior, by_renoising, by_eta, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.x, c.x, rtol=1e-12, atol=1e-12)


@stochastic
def test_order_of_convergence_of_the_variance_of_a_gaussian(name: str, options: dict[str, object]) -> None:
    sigma_max, sigma_min = 14.6, 0.03

    def variance(n: int) -> float:
        # A sample is linear in its start and in the noise of its steps; a row answers to one of them each.
        start, *impulses = torch.eye(2 * n + 1, dtype=torch.float64)[..., None]
        white = iter(impulses)
        noise = path_noise(lambda: next(white)) if SPECS[name].brownian else lambda s, s_next: next(white)
        grid = karras_levels(sigma_max, sigma_min, 7.0, n + 1)
        solver = SAMPLERS[name](gaussian(0.0, STD), start, grid, noise, **options)
        *_, last = (step.x[:, 0] ** 2 for step in solver)
        return (last[0] * (STD**2 + sigma_max**2) + last[1:].sum()).item()

    errors = [abs(variance(n) - (STD**2 + sigma_min**2)) for n in (16, 32, 64, 128, 256)]
    assert fitted_order(errors) > SPECS[name].order - 0.15, f"errors {errors}"


@pytest.mark.parametrize(("variance", "std"), [("small", 0.0), ("large", 1.0)])
def test_either_variance_of_ddpm_is_exact_for_its_data(variance: str, std: float) -> None:
    """In any number of steps: small for a point, large for N(0, 1) (Ho et al. 2006.11239, section 3.2)."""
    points, grid = 200_000, torch.tensor([10.0, 4.0, 1.5, 0.5])
    x = torch.randn(points, 1) * math.sqrt(std**2 + 100)
    for step in run("ddpm", gaussian(0.0, std), x, grid, variance=variance):
        expected = math.sqrt(std**2 + step.sigma**2)
        assert abs(step.x.std() - expected) < 4 * expected / math.sqrt(2 * points)


def test_noise_of_a_picture_is_the_same_in_any_batch_and_place() -> None:
    shape = (4, 5, 3)
    alone, together = seeded_noise([7], shape), seeded_noise([3, 7, 12], shape)
    for _ in range(3):
        assert torch.equal(alone(2.0, 1.0)[0], together(2.0, 1.0)[1])


def test_seeded_noise_is_unit_gaussian_and_anew_at_each_call() -> None:
    noise = seeded_noise(range(8), (4, 32, 32))
    first, second = noise(math.inf, 9.0), noise(9.0, 3.0)
    assert first.shape == (8, 4, 32, 32)
    assert abs(first.mean()) < 4 / math.sqrt(first.numel())
    assert abs(first.std() - 1) < 4 / math.sqrt(2 * first.numel())
    assert abs((first * second).mean()) < 4 / math.sqrt(first.numel())
    assert abs((first[0] * first[1]).mean()) < 4 / math.sqrt(first[0].numel())
