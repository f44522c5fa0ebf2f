"""Every solver that diffusers has too, against its scheduler: same network, same timesteps, same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion import SAMPLERS, SPECS, Diffusion, sigmas_from_timesteps
from ldm.diffusion.parametrization import Eps, V
from ldm.diffusion.schedule import ScaledLinear

SHAPE = (2, 3, 8, 8)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


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
"""What differs by definition: plms of diffusers mixes what the network says, ours estimates of the noise, so they agree
for eps alone; lcm of diffusers lets through a share of x that is under 1e-4 at its timesteps."""


@cache
def network() -> Callable[[Tensor, Tensor], Tensor]:
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
    return lambda x, t: unet(x, t).sample


CASES = [(case, prediction) for case in PEERS for prediction in ("eps", "v") if (case, prediction) != ("plms", "v")]


@pytest.mark.parametrize("n", [7, 20, 50])
@pytest.mark.parametrize(("case", "prediction"), CASES)
@torch.no_grad()
def test_it_ends_where_the_scheduler_of_diffusers_ends(case: str, prediction: str, n: int) -> None:
    name, peer = case.split(maxsplit=1)[0], PEERS[case]
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = getattr(diffusers, peer.scheduler)(**BETAS, prediction_type=kind, **peer.settings)
    scheduler.set_timesteps(n)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma

    theirs, generator = start, torch.Generator().manual_seed(2)
    takes_generator = {"generator": generator} if SPECS[name].stochastic else {}
    for t in scheduler.timesteps:
        answer = network()(scheduler.scale_model_input(theirs, t), t)
        theirs = scheduler.step(answer, t, theirs, **takes_generator, **peer.step).prev_sample

    diffusion = Diffusion(ScaledLinear(), Eps() if prediction == "eps" else V())
    stops = torch.unique(scheduler.timesteps[scheduler.timesteps == scheduler.timesteps.round()]).flip(0)
    grid = sigmas_from_timesteps(diffusion.schedule, stops, peer.final)
    variance_preserving = float(scheduler.init_noise_sigma) == 1
    x = diffusion.start(start, float(grid[0])) if variance_preserving else start
    noise_generator = torch.Generator().manual_seed(2)
    options: dict[str, Any] = dict(peer.options)
    if SPECS[name].stochastic:
        options["noise"] = lambda s, s_next: torch.randn(SHAPE, generator=noise_generator)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return diffusion.denoise(lambda x, t, _: network()(x, t), x, sigma, None)

    *_, last = SAMPLERS[name](denoise, x, grid, **options)
    assert len(grid) == n + 1
    ours = diffusion.finish(last.x, float(grid[-1]))
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
