from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldm.config import from_dict, to_dict
from ldm.diffusion import Diffusion, Parametrization, Schedule
from ldm.diffusion.parametrization import X0, Edm, EdmV, Eps, Flow, V
from ldm.diffusion.schedule import Flow as FlowSchedule
from ldm.diffusion.schedule import Karras, Linear, ScaledLinear
from ldm.errors import ConfigError

ROWS = [Eps(), V(), X0(), Flow(), Edm(), Edm(sigma_data=1.3), EdmV()]
every_row = pytest.mark.parametrize("row", ROWS, ids=repr)
levels = st.floats(math.log(1e-3), math.log(4096)).map(math.exp)
values = st.floats(-4, 4)


@given(row=st.sampled_from(ROWS), sigma=levels, x0=values, noise=values)
def test_each_target_is_its_row_solved_for_f(row: Parametrization, sigma: float, x0: float, noise: float) -> None:
    s, x0_, n = (torch.tensor(value, dtype=torch.float64) for value in (sigma, x0, noise))
    skip, out, _ = row.scalings(s)
    solved = (x0_ - skip * (x0_ + s * n)) / out
    torch.testing.assert_close(row.target(x0_, n, s), solved, rtol=1e-9, atol=1e-9)


@every_row
def test_a_network_that_answers_the_target_denoises_perfectly_in_fp32(row: Parametrization) -> None:
    x0, noise = torch.randn(6, 3, 5), torch.randn(6, 3, 5)
    sigma = torch.tensor([0.002, 0.03, 0.5, 1.0, 14.6, 80.0])
    level = sigma[:, None, None]
    denoised = Diffusion(ScaledLinear(), row).denoise(
        lambda x, noise_level, conditioning: row.target(x0, noise, level), x0 + level * noise, sigma, None
    )
    # What rounding costs: x is known to 2^-24 of sigma.
    assert ((denoised - x0).abs() <= 1e-6 * (1 + level) * (1 + noise.abs() + x0.abs())).all()


@pytest.mark.parametrize(
    ("row", "sigma_data"), [(Eps(), 1.0), (V(), 1.0), (X0(), 1.0), (Edm(), 0.5), (Edm(sigma_data=1.3), 1.3)]
)
@given(sigma=levels)
def test_the_network_sees_unit_variance(row: Parametrization, sigma_data: float, sigma: float) -> None:
    inp = row.scalings(torch.tensor(sigma, dtype=torch.float64)).inp.item()
    assert inp**2 * (sigma_data**2 + sigma**2) == pytest.approx(1)


@given(sigma=levels, sigma_data=st.floats(0.1, 3))
def test_the_target_of_edm_has_unit_variance(sigma: float, sigma_data: float) -> None:
    row, s = Edm(sigma_data=sigma_data), torch.tensor(sigma, dtype=torch.float64)
    of_data = row.target(torch.tensor(sigma_data), torch.tensor(0.0), s).item()
    of_noise = row.target(torch.tensor(0.0), torch.tensor(1.0), s).item()
    assert of_data**2 + of_noise**2 == pytest.approx(1)


@pytest.mark.parametrize(
    ("schedule", "row", "sigma", "expected"),
    [
        (Linear(), Eps(), Linear().table[417], 417),
        (Linear(), V(), Linear().table[0], 0),
        (ScaledLinear(zero_terminal_snr=True), X0(), torch.tensor(4096.0), 999),
        (FlowSchedule(shift=3.0), Flow(), torch.tensor(0.25), 200),
        (Karras(), Edm(), torch.tensor(math.exp(-2)), -0.5),
    ],
)
def test_what_the_network_is_told_of_the_noise(
    schedule: Schedule, row: Parametrization, sigma: Tensor, expected: float
) -> None:
    told = []

    def network(x: Tensor, noise_level: Tensor, conditioning: str) -> Tensor:
        told.append((noise_level, conditioning))
        return x

    Diffusion(schedule, row).denoise(network, torch.zeros(2, 4), sigma.float().expand(2), "as it is")
    [(noise_level, conditioning)] = told
    assert noise_level.tolist() == pytest.approx([expected, expected], abs=1e-3)
    assert conditioning == "as it is"


def test_forward_process_and_velocity_equal_diffusers() -> None:
    diffusion, peer = Diffusion(Linear(), V()), DDPMScheduler()
    x0, noise, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.tensor([0, 10, 300, 700, 999])
    sigma = diffusion.schedule.sigma(t)
    level = sigma[:, None, None, None]
    seen = []
    diffusion.model_output(lambda x, noise_level, conditioning: seen.append(x) or x, x0 + level * noise, sigma, None)
    torch.testing.assert_close(seen[0], peer.add_noise(x0, noise, t), atol=1e-5, rtol=0)
    torch.testing.assert_close(V().target(x0, noise, level), peer.get_velocity(x0, noise, t), atol=1e-5, rtol=0)


@every_row
def test_sampling_starts_from_noise_in_the_networks_coordinates(row: Parametrization) -> None:
    diffusion, noise = Diffusion(Linear(num_timesteps=100, beta_end=0.005), row), torch.randn(3, 2)
    sigma = diffusion.schedule.sigma_max
    seen = []
    diffusion.model_output(
        lambda x, noise_level, conditioning: seen.append(x) or x,
        diffusion.start(noise, sigma),
        torch.full((3,), sigma),
        None,
    )
    torch.testing.assert_close(seen[0], noise)


def test_what_is_left_at_a_level_is_finished_in_unit_variance_coordinates() -> None:
    diffusion, x = Diffusion(), torch.randn(4, 3)
    assert torch.equal(diffusion.finish(x, 0.0), x)
    sigma = diffusion.schedule.sigma_min
    torch.testing.assert_close(diffusion.finish(x, sigma), x * diffusion.schedule.alphas_cumprod[0].sqrt().float())


@every_row
def test_a_network_of_low_precision_leaves_the_rest_in_fp32(row: Parametrization) -> None:
    x, sigma = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.tensor([0.3, 7.0])
    denoised = Diffusion(ScaledLinear(), row).denoise(
        lambda x, noise_level, conditioning: x.bfloat16() * 0, x, sigma, None
    )
    skip = row.scalings(sigma).skip[:, None, None, None]
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, skip * x)
    assert denoised.is_contiguous(memory_format=torch.channels_last)


def test_eps_cannot_be_learned_from_pure_noise() -> None:
    node = {"schedule": {"kind": "scaled_linear", "zero_terminal_snr": True}, "parametrization": "eps"}
    with pytest.raises(ConfigError, match=r"^diffusion: zero_terminal_snr .* choose v"):
        from_dict(Diffusion, node, "diffusion")
    assert from_dict(Diffusion, node | {"parametrization": "v"}).schedule.sigma_max == 4096


@every_row
def test_a_diffusion_survives_its_file(row: Parametrization) -> None:
    diffusion = Diffusion(FlowSchedule(shift=2.5), row)
    assert from_dict(Diffusion, to_dict(diffusion)) == diffusion


def test_the_scale_of_the_data_is_positive() -> None:
    with pytest.raises(ConfigError, match="sigma_data"):
        from_dict(Parametrization, {"kind": "edm", "sigma_data": 0})
