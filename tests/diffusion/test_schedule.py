from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import from_dict
from ldm.diffusion.schedule import Cosine, Flow, Karras, Linear, ScaledLinear, Schedule, Sigmoid
from ldm.errors import ConfigError

SCHEDULES = [
    Linear(),
    ScaledLinear(),
    ScaledLinear(zero_terminal_snr=True),
    Cosine(),
    Cosine(zero_terminal_snr=True),
    Sigmoid(num_timesteps=100, beta_start=1e-5, beta_end=0.5e-2),
    Flow(),
    Flow(shift=3.0),
    Karras(),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


@pytest.mark.parametrize(
    ("schedule", "peer"),
    [
        (Linear(), DDIMScheduler(beta_schedule="linear")),
        (
            ScaledLinear(),
            DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        ),
        (Cosine(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")),
        (Sigmoid(), DDPMScheduler(beta_schedule="sigmoid")),
        (Linear(zero_terminal_snr=True), DDIMScheduler(beta_schedule="linear", rescale_betas_zero_snr=True)),
        (
            Cosine(zero_terminal_snr=True),
            DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True),
        ),
        (
            Linear(num_timesteps=37, beta_start=0.001, beta_end=0.3),
            DDIMScheduler(num_train_timesteps=37, beta_start=0.001, beta_end=0.3),
        ),
    ],
    ids=str,
)
def test_alphas_cumprod_equal_diffusers(schedule: Schedule, peer: Any) -> None:
    torch.testing.assert_close(schedule.alphas_cumprod.float(), peer.alphas_cumprod, atol=2e-6, rtol=0)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noise_levels_equal_diffusers_up_to_the_cap(zero_terminal_snr: bool) -> None:
    schedule = ScaledLinear(zero_terminal_snr=zero_terminal_snr)
    peer = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    torch.testing.assert_close(schedule.table.flip(0).float(), peer.sigmas[:-1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_equal_diffusers(shift: float) -> None:
    peer = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)  # u of our t, rising
    sigma = Flow(shift=shift).table.float()
    torch.testing.assert_close(sigma / (1 + sigma), peer, atol=3e-4, rtol=0)  # the cap: 4096 / 4097 for 1


def test_sigmoid_is_the_tutorials() -> None:
    betas = torch.sigmoid(torch.linspace(-6, 6, 100)) * (0.5e-2 - 1e-5) + 1e-5
    sigmoid = Sigmoid(num_timesteps=100, beta_start=1e-5, beta_end=0.5e-2)
    torch.testing.assert_close(sigmoid.betas.float(), betas)
    torch.testing.assert_close(sigmoid.alphas_cumprod.float(), torch.cumprod(1 - betas, 0))


@every_schedule
def test_levels_rise_and_are_finite(schedule: Schedule) -> None:
    assert schedule.table.dtype == torch.float64
    assert schedule.table.shape == (schedule.num_timesteps,)
    assert (schedule.table.diff() > 0).all()
    assert 0 < schedule.sigma_min < schedule.sigma_max <= 4096


def test_zero_terminal_snr_ends_at_the_cap_and_keeps_the_first_level() -> None:
    schedule, plain = ScaledLinear(zero_terminal_snr=True), ScaledLinear()
    assert schedule.sigma_max == 4096
    assert schedule.alphas_cumprod[-1] == pytest.approx(2**-24)
    assert schedule.sigma_min == pytest.approx(plain.sigma_min, rel=1e-12)


@given(share=st.floats(0, 1), schedule=st.sampled_from(SCHEDULES))
def test_timestep_of_the_level_of_a_timestep_is_the_timestep(share: float, schedule: Schedule) -> None:
    t = torch.tensor([share * (schedule.num_timesteps - 1)], dtype=torch.float64)
    torch.testing.assert_close(schedule.t(schedule.sigma(t)), t, atol=1e-8, rtol=0)


@every_schedule
def test_whole_timesteps_hit_the_rows_in_fp32(schedule: Schedule) -> None:
    rows = torch.arange(schedule.num_timesteps)
    sigma = schedule.sigma(rows)
    assert sigma.dtype == torch.float32
    assert torch.equal(sigma, schedule.table.float())
    torch.testing.assert_close(schedule.t(sigma), rows.float(), atol=1e-3, rtol=0)


def test_between_rows_the_logarithm_is_linear_and_beyond_them_constant() -> None:
    schedule = ScaledLinear()
    middle = schedule.sigma(torch.tensor([[41.5]], dtype=torch.float64))
    assert middle.shape == (1, 1)
    assert middle.item() == pytest.approx((schedule.table[41] * schedule.table[42]).sqrt().item(), rel=1e-12)
    assert schedule.sigma(torch.tensor([-3.0, 1200.0])).tolist() == pytest.approx(
        [schedule.sigma_min, schedule.sigma_max]
    )
    assert schedule.t(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]


def test_the_table_is_no_part_of_what_the_config_is() -> None:
    used, fresh = ScaledLinear(), ScaledLinear()
    assert used.sigma_max > 1
    assert used == fresh
    assert hash(used) == hash(fresh)
    assert copy.deepcopy(used) == fresh


@pytest.mark.parametrize(
    "node",
    [
        {"kind": "linear", "num_timesteps": 1},
        {"kind": "linear", "beta_start": 0.1, "beta_end": 0.01},
        {"kind": "sigmoid", "beta_end": 1.0},
        {"kind": "flow", "shift": 0},
        {"kind": "karras", "sigma_min": 90},
        {"kind": "karras", "sigma_max": 5000},
    ],
    ids=str,
)
def test_impossible_schedules_are_refused_by_place(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^diffusion\.schedule: .*(must|needs)"):
        from_dict(Schedule, node, "diffusion.schedule")
