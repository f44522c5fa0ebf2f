"""Whole samples against diffusers' schedulers, with the same network, timesteps and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion import SAMPLERS, SPECS, Diffusion, Parametrization, sigmas, sigmas_from_timesteps
from ldm.diffusion.parametrization import Eps, Flow, V
from ldm.diffusion.schedule import Flow as FlowSchedule
from ldm.diffusion.schedule import ScaledLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # diffusers calls NumPy in ways that end, each step

SHAPE = (3, 3, 8, 8)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION: dict[type[Parametrization], str] = {Eps: "epsilon", V: "v_prediction"}
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

Function = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def network() -> Function:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    unet.conv_out.weight.data *= 4  # answers of about unit size

    def function(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return unet(x, t).sample

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
class Peer:
    """A scheduler of diffusers, how it is set up to do what ours does, and where its grid ends."""

    scheduler: str
    settings: dict[str, Any] = field(default_factory=dict)
    final: Literal["zero", "sigma_min"] = "zero"
    options: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)


LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}

PEERS = {
    "ddim": Peer("DDIMScheduler", LEADING | {"set_alpha_to_one": False, "clip_sample": False}, "sigma_min"),
    "ddim eta": Peer(
        "DDIMScheduler",
        LEADING | {"set_alpha_to_one": False, "clip_sample": False},
        "sigma_min",
        options={"eta": 0.7},
        step={"eta": 0.7},
    ),
    "ddpm": Peer("DDPMScheduler", TRAILING | {"clip_sample": False}),
    "ddpm large": Peer(
        "DDPMScheduler",
        {"timestep_spacing": "leading", "clip_sample": False, "variance_type": "fixed_large"},
        options={"variance": "large"},
    ),
    "plms": Peer("PNDMScheduler", LEADING | {"skip_prk_steps": True}, "sigma_min"),
    "euler": Peer("EulerDiscreteScheduler", TRAILING),
    "euler_ancestral": Peer("EulerAncestralDiscreteScheduler", TRAILING),
    "heun": Peer("HeunDiscreteScheduler", LEADING),
    "lms": Peer("LMSDiscreteScheduler", LEADING),
    "dpm2": Peer("KDPM2DiscreteScheduler", LEADING),
    "dpm2_ancestral": Peer("KDPM2AncestralDiscreteScheduler", TRAILING),
    "dpmpp_2m": Peer("DPMSolverMultistepScheduler", LEADING),
    "dpmpp_2m_sde": Peer("DPMSolverMultistepScheduler", TRAILING | {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Peer("UniPCMultistepScheduler", TRAILING),
    "unipc of order 3": Peer("UniPCMultistepScheduler", LEADING | {"solver_order": 3}, options={"order": 3}),
    "deis": Peer("DEISMultistepScheduler", LEADING, "sigma_min"),
    "lcm": Peer("LCMScheduler", {"clip_sample": False}),
}
# What differs by definition. DDIM of diffusers takes t - T // n for the next timestep, which is the next of the grid only
# with leading spacing, and its DDPM of large variance adds noise at the end unless that is t = 0. Its plms mixes what the
# network says, ours estimates of the noise: they agree for eps. Its lcm lets through a share of x that is under 1e-4.
CASES = [(case, prediction) for case in PEERS for prediction in (Eps(), V()) if (case, prediction) != ("plms", V())]


@pytest.mark.parametrize("n", [7, 25])
@pytest.mark.parametrize(("case", "parametrization"), CASES, ids=str)
def test_samples_equal_diffusers(case: str, parametrization: Parametrization, n: int, network: Function) -> None:
    name, peer = case.split(maxsplit=1)[0], PEERS[case]
    prediction = PREDICTION[type(parametrization)]
    scheduler = getattr(diffusers, peer.scheduler)(**SD, prediction_type=prediction, **peer.settings)
    generator = {"generator": torch.Generator().manual_seed(7)} if SPECS[name].stochastic else {}
    theirs = peers_sample(scheduler, n, network, **generator, **peer.step)

    diffusion = Diffusion(ScaledLinear(), parametrization)
    stops = scheduler.timesteps[scheduler.timesteps == scheduler.timesteps.round()].unique().flip(0)
    assert len(stops) == n  # of solvers that look between them, or at one twice, too
    grid = sigmas_from_timesteps(diffusion.schedule, stops, peer.final)
    # Where diffusers' x is x0 + sigma n as ours is, it starts at sigma times the noise, else at the noise.
    at_noise = float(scheduler.init_noise_sigma) == 1
    x = diffusion.start(NOISE, grid[0].item()) if at_noise else NOISE * scheduler.init_noise_sigma
    assert_alike(our_sample(name, diffusion, grid, network, x, **peer.options), theirs)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_zero_terminal_snr_equals_diffusers(name: str, network: Function) -> None:
    clip = {"clip_sample": False} if name == "ddim" else {}
    scheduler = getattr(diffusers, PEERS[name].scheduler)(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", **SD, **clip
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
