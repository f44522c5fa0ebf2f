from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion import SAMPLERS, SPACINGS, SPECS, Diffusion, sigmas
from ldm.diffusion.parametrization import X0, Edm, EdmV, Eps, V
from ldm.diffusion.parametrization import Flow as FlowPrediction
from ldm.diffusion.schedule import Cosine, Flow, Karras, Linear, ScaledLinear, Sigmoid
from ldm.errors import CheckpointError
from ldm.formats.schedulers import CLASSES, FLAGS, NEAREST, PLAIN, read_scheduler, write_scheduler
from ldm.model import SamplingConfig
from tests.diffusion.test_against_diffusers import NOISE, SD, assert_alike, our_sample

# diffusers hands tensors to numpy in a way that numpy is going to give up; a hundred thousand warnings take minutes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FILE = "scheduler/scheduler_config.json"
WITHOUT_EFFECT = {
    "clip_sample_range",  # of clipping and thresholding, which are described
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "time_shift_type",  # of dynamic shifting, which is described
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "noise_sampler_seed",
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_defaults_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    known = CLASSES[name].defaults
    assert known == {key: defaults[key] for key in known}
    ignored = WITHOUT_EFFECT | (
        {"set_alpha_to_one"} if name == "LCMScheduler" else set()
    )  # its last step adds no noise
    assert defaults.keys() - known.keys() <= ignored


WEIGHT = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(1)) / 3


def network(x: Tensor, t: Tensor) -> Tensor:
    """Answers of unit size that hang on image and timestep."""
    return 2 * torch.tanh(F.conv2d(x, WEIGHT, padding=1) + (t / 500 - 1).reshape(-1, 1, 1, 1))


def read(name: str, **settings: Any) -> tuple[Diffusion, SamplingConfig, dict[str, str]]:
    return read_scheduler({"_class_name": name, **settings}, FILE)


OURS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
}
"""Settings without which the class does by default what we do not."""

GRIDS: list[dict[str, Any]] = [
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
]
CONTINUOUS = {"prediction_type": "v_prediction", "timestep_type": "continuous"}
WITH_BETAS = [name for name in CLASSES if "beta_schedule" in CLASSES[name].defaults]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CLASSES),
    *((name, SD | grid) for name in WITH_BETAS for grid in GRIDS),
    *((name, SD | {"prediction_type": "v_prediction"}) for name in WITH_BETAS if name != "PNDMScheduler"),
    *((name, SD | {"use_karras_sigmas": True}) for name in WITH_BETAS if "use_karras_sigmas" in CLASSES[name].defaults),
    ("DDIMScheduler", SD | {"set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", SD | {"set_alpha_to_one": True, "steps_offset": 1}),
    ("EulerDiscreteScheduler", SD | {"final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", SD | {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", GRIDS[0] | {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}),
    ("UniPCMultistepScheduler", SD | {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", SD | {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "leading"}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid", "timestep_spacing": "trailing"}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_schedule": "exponential"}),
    ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0}),
    ("EulerDiscreteScheduler", SD | CONTINUOUS),
    ("EulerDiscreteScheduler", SD | CONTINUOUS | {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}),
]


def steps_that_agree(name: str, settings: dict[str, Any]) -> list[int]:
    """Where both are meant to do the same: see the sentences of the third value of ``read_scheduler``, and here."""
    spacing = settings.get("timestep_spacing", CLASSES[name].defaults.get("timestep_spacing"))
    if name in ("DDIMScheduler", "PNDMScheduler") and spacing != "leading":
        return [4, 20] if spacing == "trailing" else []  # T // n is the step of the grid
    if name == "LCMScheduler":
        return [5, 10, 25]  # divisors of its 50 timesteps
    if name == "FlowMatchEulerDiscreteScheduler":
        return [20, 50]  # pure noise is a level of 4096 here, which fewer steps show
    return [3, 7, 20]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_samples_of_a_folder_equal_diffusers(name: str, settings: dict[str, Any]) -> None:
    settings = OURS.get(name, {}) | settings
    diffusion, sampling, described = read(name, **settings)
    spec = SPECS[sampling.sampler]
    for n in steps_that_agree(name, settings):
        scheduler = getattr(diffusers, name).from_config(settings)
        scheduler.set_timesteps(n)
        sigma = float(getattr(scheduler, "init_noise_sigma", 1))
        grid = sigmas(
            diffusion.schedule, n, sampling.spacing, sampling.offset, sampling.final, sampling.shift, grid=spec.grid
        )
        # Where diffusers' x is x0 + sigma n as ours is, it starts at sigma times the noise, else at the noise.
        x = diffusion.start(NOISE, grid[0].item()) if sigma == 1 else NOISE * sigma
        ours = our_sample(sampling.sampler, diffusion, grid, network, x)
        theirs = peers_sample(scheduler, spec.stochastic)
        if spec.grid == "inner" and settings.get("use_karras_sigmas"):  # it tells the network whole timesteps
            assert "use_karras_sigmas" in described
            assert (ours - theirs).abs().max() < 5e-2 * theirs.abs().max()
        else:
            assert_alike(ours, theirs)


def peers_sample(scheduler: Any, stochastic: bool) -> Tensor:
    """A sample by a scheduler whose timesteps are set, with the noise of :func:`our_sample`."""
    x, options = NOISE * getattr(scheduler, "init_noise_sigma", 1), {}
    generator = torch.Generator().manual_seed(7)
    if hasattr(scheduler, "noise_sampler"):  # a Brownian path, else
        scheduler.noise_sampler = lambda sigma, sigma_next: torch.randn(x.shape, generator=generator)
    elif stochastic:
        options["generator"] = generator
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(x_in, t.float().expand(len(x))), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_what_differs_is_told_and_nothing_else(name: str, settings: dict[str, Any]) -> None:
    sampling, described = read(name, **OURS.get(name, {}) | settings)[1:]
    expected = {"original_inference_steps"} if name == "LCMScheduler" else set()
    if name in ("DDIMScheduler", "PNDMScheduler") and sampling.spacing != "leading":
        expected = {"timestep_spacing"}
    if settings.get("use_karras_sigmas") and SPECS[sampling.sampler].grid == "inner":
        expected = {"use_karras_sigmas"}
    assert described.keys() == expected


SAMPLING = [
    SamplingConfig(sampler, 50, 7.5, spacing, offset, final)
    for sampler, spacing, offset, final in product(SAMPLERS, SPACINGS, (0, 1), ("zero", "sigma_min"))
]


def can_say(name: str, sampling: SamplingConfig) -> bool:
    """Whether the class has words for the spacing and the final level."""
    defaults = CLASSES[name].defaults
    spacing = sampling.spacing in PLAIN or any(s == sampling.spacing and flag in defaults for flag, s in FLAGS.items())
    final = "set_alpha_to_one" in defaults or "final_sigmas_type" in defaults or sampling.final == "zero"
    if name == "LCMScheduler":
        return (sampling.spacing, sampling.offset, sampling.final) == ("trailing", 0, "zero")
    return spacing and (final if name != "DEISMultistepScheduler" else sampling.final == "sigma_min")


SCHEDULES = (ScaledLinear(), Linear(500, beta_end=0.01), Cosine(), Sigmoid())
DIFFUSIONS = [
    *(Diffusion(schedule, parametrization) for schedule in SCHEDULES for parametrization in (Eps(), V(), X0())),
    *(Diffusion(ScaledLinear(zero_terminal_snr=True), parametrization) for parametrization in (V(), X0())),
]


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=str)
def test_what_is_written_is_read_again(diffusion: Diffusion) -> None:
    exact = 0
    for sampling in SAMPLING:
        written = write_scheduler(diffusion, sampling)
        name = written["_class_name"]
        read_diffusion, read_sampling, described = read_scheduler(written, FILE)
        assert read_diffusion == diffusion
        assert described.keys() <= {
            *FLAGS,
            "timestep_spacing",
            "prediction_type",
            "original_inference_steps",
            "final_sigmas_type",
        }
        if read_sampling.sampler == sampling.sampler and can_say(name, sampling):
            assert read_sampling == sampling
            exact += 1
    assert exact >= (3 if isinstance(diffusion.schedule, Sigmoid) else 20)


def test_classes_of_diffusers_read_what_is_written() -> None:
    offset_1 = [sampling for sampling in SAMPLING if sampling.offset and sampling.final == "sigma_min"]
    files = [write_scheduler(Diffusion(ScaledLinear(), Eps()), sampling) for sampling in offset_1]
    for written in {str(written): written for written in files}.values():
        scheduler = getattr(diffusers, written["_class_name"]).from_config(written)
        assert {key: scheduler.config[key] for key in written.keys() - {"_class_name"}} == {
            key: value for key, value in written.items() if key != "_class_name"
        }
    assert {written["_class_name"] for written in files} == set(WITH_BETAS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_flow_and_edm_have_classes_of_their_own(sampler: str) -> None:
    for diffusion, spacing in (
        (Diffusion(Flow(shift=3.0), FlowPrediction()), "linspace"),
        (Diffusion(Karras(sigma_max=70.0), Edm(0.7)), "karras"),
        (Diffusion(Karras(sigma_max=120.0), EdmV(1.0)), "exponential"),
        (Diffusion(ScaledLinear(), EdmV(1.0)), "linspace"),
    ):
        written = write_scheduler(diffusion, SamplingConfig(sampler, 50, 7.5, spacing))
        getattr(diffusers, written["_class_name"]).from_config(written)
        read_diffusion, sampling, _ = read_scheduler(written, FILE)
        assert read_diffusion == diffusion
        assert sampling.spacing == spacing
        assert sampling.sampler in {"euler", "dpmpp_2m", "dpmpp_2m_sde"}


def test_every_solver_has_a_class_or_a_nearest_one() -> None:
    assert {entry.sampler for entry in CLASSES.values()} | NEAREST.keys() == SAMPLERS.keys()


def test_a_diffusion_that_diffusers_lacks_is_not_written() -> None:
    for diffusion in (
        Diffusion(Karras(), Eps()),
        Diffusion(ScaledLinear(), Edm()),
        Diffusion(Flow(50), FlowPrediction()),
    ):
        with pytest.raises(CheckpointError, match=r"no scheduler for the schedule .* write a native file"):
            write_scheduler(diffusion, SamplingConfig())


def test_keys_of_other_classes_are_ignored() -> None:
    left_over = {"skip_prk_steps": False, "clip_sample": True, "set_alpha_to_one": False, "use_karras_sigmas": None}
    assert read("EulerAncestralDiscreteScheduler", **left_over) == read("EulerAncestralDiscreteScheduler")


@pytest.mark.parametrize(
    ("name", "setting", "value", "what"),
    [
        ("DDIMScheduler", "clip_sample", True, "not clipped"),
        ("DDPMScheduler", "variance_type", "fixed_large", "variance=large"),
        ("PNDMScheduler", "skip_prk_steps", False, "Runge-Kutta"),
        ("DPMSolverMultistepScheduler", "solver_order", 3, "the order is 2"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver", r"DPM-Solver\+\+"),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True, "timestep_spacing"),
        ("UniPCMultistepScheduler", "disable_corrector", [0], "corrector"),
        ("EulerDiscreteScheduler", "use_beta_sigmas", True, "noise levels"),
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", True, "the image size"),
        ("EDMEulerScheduler", "rho", 5.0, "uses 7"),
    ],
)
def test_what_we_do_otherwise_is_told(name: str, setting: str, value: Any, what: str) -> None:
    described = read(name, **OURS.get(name, {}) | {setting: value})[2]
    assert described.keys() == {setting}
    assert what.replace("\\", "") in described[setting]


def test_an_unknown_class_is_told_and_gives_way() -> None:
    diffusion, sampling, described = read("TCDScheduler", **SD, prediction_type="v_prediction")
    assert diffusion == Diffusion(ScaledLinear(), V())
    assert (sampling.sampler, sampling.spacing) == ("dpmpp_2m", "trailing")
    assert described == {"_class_name": "TCDScheduler is unknown; dpmpp_2m is used instead."}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": None}, "must name the scheduler's class"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'; it must be an integer"),
        ({"num_train_timesteps": True}, "must be an integer"),
        ({"num_train_timesteps": 1}, "at least 2"),
        ({"num_train_timesteps": 10**12}, "at most 1000000"),
        ({"beta_start": [1]}, "must be a number"),
        ({"beta_end": -0.1}, "beta_end -0.1"),
        ({"beta_end": float("nan")}, "beta_end is nan; it must be a number"),
        ({"beta_end": 10**400}, "beta_end is 1000"),
        ({"steps_offset": 1000}, "steps_offset is 1000; it must be from 0 to below 1000"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": float("inf")}, "shift is inf"),
        ({"beta_schedule": "squaredcos_cap"}, "did you mean 'squaredcos_cap_v2'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"prediction_type": "v"}, "unknown prediction_type 'v'"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction requires use_flow_sigmas"),
        ({"timestep_spacing": "trialing"}, "did you mean 'trailing'"),
        ({"final_sigmas_type": "one"}, "unknown final_sigmas_type"),
        ({"use_karras_sigmas": "yes"}, "must be true or false"),
        ({"rescale_betas_zero_snr": True}, "choose v"),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 0.0}, "sigma_max 0.0"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "only epsilon and v_prediction"),
        ({"_class_name": "CosineDPMScheduler", "sigma_data": 1.0}, "CosineDPMScheduler has the setting sigma_data 1.0"),
        ({"_class_name": "OtherScheduler", "shift": 3.0}, "OtherScheduler has the setting shift 3.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 50}, "must be 1000"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_its_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_scheduler({"_class_name": "EulerDiscreteScheduler"} | settings, FILE)
    assert str(error.value).startswith(f"{FILE}: ")
