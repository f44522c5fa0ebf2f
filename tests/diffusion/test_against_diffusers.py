"""Whole samples against diffusers' schedulers, with the same network, timesteps and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion import SAMPLERS, SPECS, Diffusion, Parametrization, sigmas, timesteps
from ldm.diffusion.parametrization import Eps, Flow, V
from ldm.diffusion.schedule import Flow as FlowSchedule
from ldm.diffusion.schedule import ScaledLinear

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION: dict[type[Parametrization], str] = {Eps: "epsilon", V: "v_prediction"}
NOISE = torch.randn(3, 4, 5, 3, generator=torch.Generator().manual_seed(0))

Function = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def network() -> Function:
    """A small random function of x [b 4 5 3] and t [b], in the place of a U-Net."""
    generator = torch.Generator().manual_seed(1)
    width = NOISE[0].numel()
    first, second = (torch.randn(width, width, generator=generator) / width**0.5 for _ in range(2))
    frequencies = torch.rand(width, generator=generator) / 50

    def function(x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(x.flatten(1) @ first + torch.sin(t[:, None] * frequencies))
        return (hidden @ second).reshape(x.shape)

    return function


def peers_sample(scheduler: Any, n: int, network: Function, **step: Any) -> Tensor:
    scheduler.set_timesteps(n)
    x = NOISE * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(x_in, t.float().expand(len(x))), t, x, **step).prev_sample
    return x


def our_sample(name: str, diffusion: Diffusion, grid: Tensor, network: Function, x: Tensor, **options: Any) -> Tensor:
    if SPECS[name].stochastic:
        generator = torch.Generator().manual_seed(7)
        options["noise"] = lambda s, s_next: torch.randn(x.shape, generator=generator)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return diffusion.denoise(lambda x, t, conditioning: network(x, t), x, sigma, None)

    for step in SAMPLERS[name](denoise, x, grid, **options):
        x = step.x
    return diffusion.finish(x, grid[-1].item())


def assert_alike(ours: Tensor, peers: Tensor) -> None:
    assert (ours - peers).abs().max() < 1e-3 * peers.abs().max()


@dataclass(frozen=True)
class Case:
    """A sampler of ours with its options, and the peer with its settings and arguments of ``step``."""

    name: str
    peer: Any
    settings: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    spacing: str = "trailing"


# diffusers' DDIM takes t - T // n for the next timestep, and its DDPM of large variance adds noise at the end
# unless that is t = 0. With the leading spacing both do as their papers say.
UNCLIPPED: dict[str, Any] = {"clip_sample": False}
CASES = {
    "ddim": Case("ddim", diffusers.DDIMScheduler, UNCLIPPED, spacing="leading"),
    "ddim, eta": Case("ddim", diffusers.DDIMScheduler, UNCLIPPED, {"eta": 0.7}, {"eta": 0.7}, "leading"),
    "ddpm": Case("ddpm", diffusers.DDPMScheduler, UNCLIPPED),
    "ddpm, large": Case(
        "ddpm",
        diffusers.DDPMScheduler,
        UNCLIPPED | {"variance_type": "fixed_large"},
        options={"variance": "large"},
        spacing="leading",
    ),
    "euler": Case("euler", diffusers.EulerDiscreteScheduler),
    "euler_ancestral": Case("euler_ancestral", diffusers.EulerAncestralDiscreteScheduler),
    "heun": Case("heun", diffusers.HeunDiscreteScheduler),
    "dpmpp_2m": Case("dpmpp_2m", diffusers.DPMSolverMultistepScheduler),
}


@pytest.mark.parametrize("n", [7, 20, 50])
@pytest.mark.parametrize("parametrization", [Eps(), V()], ids=repr)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_samples_equal_diffusers(case: Case, parametrization: Parametrization, n: int, network: Function) -> None:
    scheduler = case.peer(
        timestep_spacing=case.spacing,
        prediction_type=PREDICTION[type(parametrization)],
        **SD,
        **case.settings,
    )
    generator = {"generator": torch.Generator().manual_seed(7)} if SPECS[case.name].stochastic else {}
    peers = peers_sample(scheduler, n, network, **case.step, **generator)

    diffusion = Diffusion(ScaledLinear(), parametrization)
    grid = sigmas(diffusion.schedule, n, case.spacing)
    ours = timesteps(diffusion.schedule, n, case.spacing)
    assert scheduler.timesteps.unique().flip(0).tolist() == ours.tolist()  # Heun's have each twice
    # Where diffusers' x is x0 + sigma n as ours is, it starts at sigma times the noise, else at the noise.
    x = NOISE * grid[0] if scheduler.init_noise_sigma != 1 else diffusion.start(NOISE, grid[0].item())
    assert_alike(our_sample(case.name, diffusion, grid, network, x, **case.options), peers)


@pytest.mark.parametrize("parametrization", [Eps(), V()], ids=repr)
def test_ddim_of_stable_diffusion_ends_at_timestep_0(parametrization: Parametrization, network: Function) -> None:
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=PREDICTION[type(parametrization)],
        **SD,
    )
    diffusion = Diffusion(ScaledLinear(), parametrization)
    grid = sigmas(diffusion.schedule, 50, "leading", offset=1, final="sigma_min")
    x = diffusion.start(NOISE, grid[0].item())
    ours = our_sample("ddim", diffusion, grid, network, x)
    assert_alike(ours, peers_sample(scheduler, 50, network))
    # and not at 0, which is another picture
    ending_at_0 = our_sample("ddim", diffusion, sigmas(diffusion.schedule, 50, "leading", offset=1), network, x)
    assert (ours - ending_at_0).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_zero_terminal_snr_equals_diffusers(name: str, network: Function) -> None:
    scheduler = CASES[name].peer(
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        **SD,
        **CASES[name].settings,
    )
    diffusion = Diffusion(ScaledLinear(zero_terminal_snr=True), V())
    grid = sigmas(diffusion.schedule, 20)
    x = diffusion.start(NOISE, grid[0].item())
    assert_alike(our_sample(name, diffusion, grid, network, x), peers_sample(scheduler, 20, network))


def test_flow_equals_diffusers(network: Function) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusion = Diffusion(FlowSchedule(), Flow())
    grid = sigmas(diffusion.schedule, 25)
    scheduler.set_timesteps(sigmas=(grid / (1 + grid))[:-1].tolist())
    x = NOISE
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x))), t, x).prev_sample
    assert_alike(our_sample("euler", diffusion, grid, network, diffusion.start(NOISE, grid[0].item())), x)
