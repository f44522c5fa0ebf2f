from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from ldm.diffusion import SPACINGS, SPECS, Schedule, sigmas, sigmas_from_timesteps, sigmas_from_values, timesteps
from ldm.diffusion.schedule import Flow, Karras, ScaledLinear
from ldm.diffusion.spacing import Grid
from ldm.errors import SamplingError

# diffusers hands tensors to numpy in a way that numpy is going to give up; a hundred thousand warnings take minutes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COUNTS = (1, 2, 7, 16, 20, 30, 50, 333, 999)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_timesteps_equal_diffusers(spacing: str, offset: int) -> None:
    for n in COUNTS:
        if spacing == "linspace" and n == 1:
            continue  # of one point, numpy's linspace is timestep 0, where there is no noise to begin with
        peer = EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=offset, **SD)
        peer.set_timesteps(n)
        ours = timesteps(ScaledLinear(), n, spacing, offset)
        torch.testing.assert_close(ours.float(), peer.timesteps, rtol=0, atol=1e-3)
        # diffusers' Euler interpolates sigma linearly between rows, we its logarithm as k-diffusion does.
        torch.testing.assert_close(sigmas(ScaledLinear(), n, spacing, offset), peer.sigmas, rtol=2e-4, atol=0)


PEERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "plms": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}
BETWEEN = ("heun", "dpm2", "dpm2_ancestral", "dpmpp_sde")
"""Every other timestep of their peers is where they look between or twice."""


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("name", PEERS)
def test_each_solver_reads_the_spacings_as_its_family_does(name: str, spacing: str, offset: int) -> None:
    options = {"skip_prk_steps": True} if name == "plms" else {}
    peer = getattr(diffusers, PEERS[name])(timestep_spacing=spacing, steps_offset=offset, **options, **SD)
    grid = SPECS[name].grid
    for n in range(1, 61):
        if spacing == "linspace" and n == 1 and grid != "inner":
            continue  # as above
        peer.set_timesteps(n)
        found = timesteps(ScaledLinear(), n, spacing, offset, grid)
        stops = peer.timesteps[::2] if name in BETWEEN else peer.timesteps.unique().flip(0)  # plms looks at one twice
        torch.testing.assert_close(found, stops.double(), rtol=0, atol=1e-3)
        final = "sigma_min" if name == "deis" else "zero"
        if hasattr(peer, "sigmas"):
            levels = sigmas(ScaledLinear(), n, spacing, offset, final, grid=grid)
            torch.testing.assert_close(levels[-1], peer.sigmas[-1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("spacing", ["trailing", "karras", "exponential", "sgm_uniform", "beta"])
def test_only_leading_and_linspace_heed_the_family(spacing: str) -> None:
    grids = [timesteps(ScaledLinear(), 20, spacing, grid=grid) for grid in ("fractional", "rounded", "inner")]
    assert torch.equal(grids[0], grids[1])
    assert torch.equal(grids[0], grids[2])


def test_karras_levels_equal_diffusers() -> None:
    for n in COUNTS[1:]:
        peer = EulerDiscreteScheduler(timestep_spacing="linspace", use_karras_sigmas=True, **SD)
        peer.set_timesteps(n)
        torch.testing.assert_close(sigmas(ScaledLinear(), n, "karras"), peer.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize("schedule", [ScaledLinear(), ScaledLinear(zero_terminal_snr=True), Flow(), Karras()], ids=repr)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_every_grid_falls_from_within_the_schedule_to_0(schedule: Schedule, spacing: str) -> None:
    for n in COUNTS:
        grid = sigmas(schedule, n, spacing)
        assert grid.shape == (n + 1,)
        assert grid.dtype == torch.float32
        assert grid[0] <= np.float32(schedule.sigma_max)
        assert (grid.diff() < 0).all()
        assert grid[-1] == 0


def test_trailing_of_flow_is_even_in_its_time() -> None:
    grid = sigmas(Flow(), 10)[1:]  # the first is the cap
    torch.testing.assert_close(grid / (1 + grid), torch.linspace(0.9, 0, 10), atol=1e-6, rtol=0)


def test_the_grid_may_end_at_timestep_0() -> None:
    assert sigmas(ScaledLinear(), 20, "leading", offset=1, final="sigma_min")[-1] == np.float32(
        ScaledLinear().sigma_min
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_grid_that_reaches_timestep_0_ends_there(spacing: str) -> None:
    grid = sigmas(ScaledLinear(), 10, spacing, final="sigma_min")
    assert grid[-1] == ScaledLinear().table[0].float()
    assert (grid[:-1] > grid[1:]).all()


def test_timesteps_of_ones_own() -> None:
    grid = sigmas_from_timesteps(ScaledLinear(), [999, 500.5, 3])
    table = ScaledLinear().table
    expected = torch.stack([table[999], (table[500] * table[501]).sqrt(), table[3], torch.zeros(())])
    torch.testing.assert_close(grid, expected.float())


def test_levels_of_ones_own_may_be_rounded_and_lack_the_0() -> None:
    align_your_steps = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    grid = sigmas_from_values(ScaledLinear(), align_your_steps)
    assert torch.equal(grid, torch.tensor([*align_your_steps, 0]))
    assert torch.equal(sigmas_from_values(ScaledLinear(), [*align_your_steps, 0]), grid)


@pytest.mark.parametrize(
    ("n", "spacing", "offset", "message"),
    [
        (0, "trailing", 0, "must be 1 or more"),
        (-4, "karras", 0, "must be 1 or more"),
        (1001, "leading", 0, "fewer steps"),
        (1000, "leading", 1, "fewer steps"),
        (1001, "trailing", 0, "fewer steps"),
        (20, "trialing", 0, "did you mean 'trailing'"),
    ],
)
def test_impossible_grids_are_refused(n: int, spacing: str, offset: int, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        sigmas(ScaledLinear(), n, spacing, offset)


@pytest.mark.parametrize(("spacing", "grid"), [("leading", "inner"), ("linspace", "inner"), ("linspace", "rounded")])
def test_a_family_has_room_for_less(spacing: str, grid: Grid) -> None:
    with pytest.raises(SamplingError, match="do not fit into 1000 timesteps; ask for fewer steps"):
        timesteps(ScaledLinear(), 1001 if grid == "rounded" else 1000, spacing, grid=grid)


@pytest.mark.parametrize("values", [[], [1, 2], [5, 5], [1000, 3], [4, -1], [float("nan")]], ids=str)
def test_impossible_timesteps_are_refused(values: list[float]) -> None:
    with pytest.raises(SamplingError, match=r"timesteps .* do not fit the schedule; give .* from 999 down to 0"):
        sigmas_from_timesteps(ScaledLinear(), values)


@pytest.mark.parametrize("values", [[], [0], [1, 2], [5, 5], [14.8, 3], [4, -1], [4, 0, 0], [float("nan")]], ids=str)
def test_impossible_levels_are_refused(values: list[float]) -> None:
    with pytest.raises(SamplingError, match=r"sigmas .* do not fit the schedule; give .* from 14\.6146 down"):
        sigmas_from_values(ScaledLinear(), values)
