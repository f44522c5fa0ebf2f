"""Conversion of diffusers' ``scheduler_config.json``: noise schedule, prediction type and sampling settings.

The file names a diffusers scheduler class and the settings that differ from the defaults of that class. :data:`CLASSES` maps
each class to a solver of ldm and to its defaults. A setting that ldm's solvers do not implement is reported in a note (the
images differ slightly); a setting without which the network would get wrong inputs is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.diffusion import SPECS, Diffusion
from ldm.diffusion.parametrization import X0, Edm, EdmV, Eps, Flow, Parametrization, V
from ldm.diffusion.schedule import BetaSchedule, Cosine, Karras, Linear, ScaledLinear, Schedule, Sigmoid
from ldm.diffusion.schedule import Flow as FlowSchedule
from ldm.errors import CheckpointError, ConfigError, unknown
from ldm.model import SamplingConfig

STEPS, GUIDANCE, GUIDANCE_SDXL = 50, 7.5, 5.0
"""Default steps and guidance scales of diffusers' pipelines; scheduler configs do not hold them."""

MOST_TIMESTEPS = 1_000_000
"""Largest accepted ``num_train_timesteps``, which bounds the memory of the table of noise levels."""

SCHEDULES: dict[str, type[BetaSchedule]] = {
    "linear": Linear,
    "scaled_linear": ScaledLinear,
    "squaredcos_cap_v2": Cosine,
    "sigmoid": Sigmoid,
}
"""Schedule class for each ``beta_schedule``."""

PREDICTIONS: dict[str, type[Parametrization]] = {
    "epsilon": Eps,
    "v_prediction": V,
    "sample": X0,
    "flow_prediction": Flow,
}
"""Parametrization class for each ``prediction_type``."""

EDM_PREDICTIONS: dict[str, type[Edm]] = {"epsilon": Edm, "v_prediction": EdmV}
"""Parametrization class for each ``prediction_type`` of a network that embeds ln(sigma) / 4."""

FOREIGN = ("sigma_data", "shift", "flow_shift", "use_flow_sigmas")
"""Settings of networks that the fallback for unknown classes would read as predicting at timesteps of a beta schedule."""

FLAGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
"""Spacing that each flag selects instead of ``timestep_spacing``."""

PLAIN = ("leading", "trailing", "linspace")
"""Values of ``timestep_spacing``, which are also names of ldm's spacings."""


@dataclass(frozen=True)
class SchedulerClass:
    """Solver and defaults of a diffusers scheduler class."""

    sampler: str
    """Corresponding solver of ldm."""
    defaults: Mapping[str, Any]
    """Default values of the settings that are read or reported here."""


def _class(sampler: str, *groups: Mapping[str, Any], **more: Any) -> SchedulerClass:
    return SchedulerClass(sampler, {name: value for group in (*groups, more) for name, value in group.items()})


_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_LATENT = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_FLAGS = dict.fromkeys(FLAGS, False)
_FINAL = {"final_sigmas_type": "zero"}
_ENDS = {"sigma_min": None, "sigma_max": None}
_CLIP = {"clip_sample": True, "thresholding": False}
_ORDER = {"solver_order": 2, "thresholding": False, "lower_order_final": True}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False}
_DPM = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
_DPM_GRID = {"use_lu_lambdas": False, "lambda_min_clipped": -math.inf, "variance_type": None}
_UNIPC = {"solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None, "shift_terminal": None}
_DISTILLED = {"clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0}
_SHIFTING = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
_EDM = {
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
}

CLASSES = {
    "EulerDiscreteScheduler": _class(
        "euler",
        _BETAS,
        _LINSPACE,
        _FLAGS,
        _ZERO_SNR,
        _FINAL,
        _ENDS,
        interpolation_type="linear",
        timestep_type="discrete",
    ),
    "EulerAncestralDiscreteScheduler": _class("euler_ancestral", _BETAS, _LINSPACE, _ZERO_SNR),
    "DDIMScheduler": _class("ddim", _BETAS, _LEADING, _ZERO_SNR, _CLIP, set_alpha_to_one=True),
    "DDPMScheduler": _class("ddpm", _BETAS, _LEADING, _ZERO_SNR, _CLIP, variance_type="fixed_small"),
    "PNDMScheduler": _class("plms", _BETAS, _LEADING, set_alpha_to_one=False, skip_prk_steps=False),
    "HeunDiscreteScheduler": _class("heun", _LATENT, _LINSPACE, _FLAGS, clip_sample=False),
    "LMSDiscreteScheduler": _class("lms", _BETAS, _LINSPACE, _FLAGS),
    "KDPM2DiscreteScheduler": _class("dpm2", _LATENT, _LINSPACE, _FLAGS),
    "KDPM2AncestralDiscreteScheduler": _class("dpm2_ancestral", _LATENT, _LINSPACE, _FLAGS),
    "DPMSolverMultistepScheduler": _class(
        "dpmpp_2m", _BETAS, _LINSPACE, _FLAGS, _ZERO_SNR, _FINAL, _ORDER, _FLOW, _DPM, _DPM_GRID
    ),
    "UniPCMultistepScheduler": _class(
        "unipc", _BETAS, _LINSPACE, _FLAGS, _ZERO_SNR, _FINAL, _ENDS, _ORDER, _FLOW, _UNIPC
    ),
    "DEISMultistepScheduler": _class(
        "deis", _BETAS, _LINSPACE, _FLAGS, _ORDER, _FLOW, algorithm_type="deis", solver_type="logrho"
    ),
    "DPMSolverSDEScheduler": _class("dpmpp_sde", _LATENT, _LINSPACE, _FLAGS),
    "LCMScheduler": _class("lcm", _LATENT, _LEADING, _ZERO_SNR, _CLIP, _DISTILLED, beta_schedule="scaled_linear"),
    "FlowMatchEulerDiscreteScheduler": _class(
        "euler", _FLAGS, _SHIFTING, num_train_timesteps=1000, invert_sigmas=False, stochastic_sampling=False
    ),
    "EDMEulerScheduler": _class("euler", _EDM, _FINAL),
    "EDMDPMSolverMultistepScheduler": _class("dpmpp_2m", _EDM, _FINAL, _ORDER, _DPM),
}
"""Scheduler classes by name. Of several that can represent a diffusion, the first is written."""

UNKNOWN = _class("dpmpp_2m", _BETAS, _LINSPACE, _FLAGS, _ZERO_SNR, timestep_spacing="trailing")
"""Fallback for a class that is not in :data:`CLASSES`."""

NEAREST = {
    "dpmpp_2m_sde": "dpmpp_2m",  # the same class, by its algorithm_type
    "dpmpp_3m_sde": "dpmpp_2m",
    "dpmpp_2s_ancestral": "dpm2_ancestral",
    "dpm_adaptive": "dpmpp_2m",
}
"""Solvers without a diffusers class, mapped to the solver that is written instead."""

SDE = ("dpmpp_2m_sde", "dpmpp_3m_sde")

IMPLEMENTED_BY = {
    "sigmoid": {"DDPMScheduler"},
    "sample": {
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DDIMScheduler",
        "DDPMScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "LCMScheduler",
    },
}
"""Values of settings that only some of the classes implement."""

OURS: dict[str, tuple[tuple[Any, ...], str]] = {
    "clip_sample": ((False,), "predicted images are not clipped here"),
    "thresholding": (
        (False,),
        "predicted images are not thresholded here; guidance has its own threshold",
    ),
    "skip_prk_steps": ((True,), "the first steps use Heun and Adams-Bashforth here, not Runge-Kutta"),
    "variance_type": (
        (None, "fixed_small", "fixed_small_log"),
        "the noise has the small (posterior) variance here; ddpm takes the option variance=large",
    ),
    "solver_order": ((2,), "the order is 2 here; unipc and deis take the option order"),
    "solver_type": (("midpoint", "bh2", "logrho"), "only the default variant of the solver is implemented here"),
    "algorithm_type": (("dpmsolver++", "sde-dpmsolver++", "deis"), "DPM-Solver++ is used here"),
    "lower_order_final": ((True,), "the last steps have lower order here"),
    "euler_at_final": ((False,), "the last step is an Euler step here only if it ends at 0"),
    "use_lu_lambdas": ((False,), "the spacing follows timestep_spacing here"),
    "lambda_min_clipped": ((-math.inf,), "no timesteps are clipped here"),
    "predict_x0": ((True,), "UniPC predicts the image here, not the noise"),
    "disable_corrector": (([],), "the corrector is always on here"),
    "solver_p": ((None,), "UniPC uses its own predictor here"),
    "interpolation_type": (("linear",), "the noise levels are those of the timesteps here"),
    "sigma_min": ((None,), "the noise levels end at the minimum of the schedule here"),
    "sigma_max": ((None,), "the noise levels begin at the maximum of the schedule here"),
    "use_flow_sigmas": ((False,), "flow models use the spacing sgm_uniform here, starting from pure noise"),
    "use_dynamic_shifting": ((False,), "the shift does not depend on the image size here"),
    "invert_sigmas": ((False,), "the noise levels decrease here"),
    "shift_terminal": ((None,), "the noise levels are not stretched here"),
    "stochastic_sampling": ((False,), "no noise is added here"),
    "timestep_scaling": ((10.0,), "the network output at low noise is used unscaled here"),
}
"""For each setting, the values that match ldm's solvers (the first is written), and what the solvers do otherwise."""


def read_scheduler(values: Mapping[str, Any], where: str) -> tuple[Diffusion, SamplingConfig, dict[str, str]]:
    """Convert a scheduler config to a diffusion and sampling settings.

    Args:
        values: the JSON of ``scheduler_config.json``; keys of other classes, which diffusers keeps, are ignored.
        where: the file, for error messages.

    Returns:
        Schedule and parametrization of the training; sampling settings (steps and guidance are those of diffusers'
        pipelines); and by setting a sentence on how ldm differs from diffusers.

    Raises:
        CheckpointError: a setting has the wrong type, a schedule, prediction type or spacing is unknown, or settings are
            incompatible.
    """
    name = values.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: _class_name is {name!r}; it must name the scheduler's class in diffusers.")
    known = CLASSES.get(name, UNKNOWN)
    foreign = [setting for setting in FOREIGN if values.get(setting) and known is UNKNOWN]
    if foreign:
        raise CheckpointError(
            f"{where}: {name} has the setting {foreign[0]} {values[foreign[0]]!r}, but ldm does not know how this scheduler "
            f"uses it; name one of {', '.join(each for each in CLASSES if foreign[0] in CLASSES[each].defaults)}."
        )
    given = _given(values, known.defaults, where)
    try:
        diffusion = _diffusion(given, where)
        sampling = SamplingConfig(
            sampler="dpmpp_2m_sde" if given.get("algorithm_type") == "sde-dpmsolver++" else known.sampler,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            spacing=_spacing(name, given, where),
            offset=given.get("steps_offset", 0),
            final="sigma_min" if _ends_above_zero(name, given, where) else "zero",
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return diffusion, sampling, dict(_differences(name, given, sampling))


def write_scheduler(diffusion: Diffusion, sampling: SamplingConfig) -> dict[str, Any]:
    """Return the JSON of a diffusers scheduler: the inverse of :func:`read_scheduler`, as far as diffusers allows.

    The diffusion is always represented exactly. Steps and guidance are not stored; a solver, spacing or final noise level
    that diffusers lacks, or lacks for this diffusion, is replaced by the nearest.

    Raises:
        CheckpointError: diffusers has no scheduler for the schedule and the parametrization.
    """
    solver = NEAREST.get(sampling.sampler, sampling.sampler)
    stated = _diffusion_values(diffusion)
    name = next(
        name
        for name in sorted(CLASSES, key=lambda name: CLASSES[name].sampler != solver)
        if stated.keys() <= CLASSES[name].defaults.keys()
        and all(name in IMPLEMENTED_BY.get(str(value), {name}) for value in stated.values())
    )
    defaults = CLASSES[name].defaults
    settings: dict[str, Any] = {
        **{
            setting: values[0]
            for setting, (values, _) in OURS.items()
            if defaults.get(setting, values[0]) not in values
        },
        **{flag: True for flag, spacing in FLAGS.items() if spacing == sampling.spacing},
        "timestep_spacing": sampling.spacing if sampling.spacing in PLAIN else "linspace",
        "steps_offset": sampling.offset,
        "sigma_schedule": "exponential" if sampling.spacing == "exponential" else "karras",
        "set_alpha_to_one": sampling.final == "zero",
        "final_sigmas_type": sampling.final,
        "algorithm_type": "sde-dpmsolver++" if sampling.sampler in SDE else defaults.get("algorithm_type"),
    }
    return {"_class_name": name} | {key: value for key, value in settings.items() if key in defaults} | stated


def _given(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return all settings of the class, checked against the type of their default (None: any type)."""
    type_names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", list: "a list"}
    given = dict(defaults)
    for name, default in defaults.items():
        value = values.get(name, default)
        kind = type(default)
        if kind is float:  # finite, and small enough not to overflow
            fits = isinstance(value, int | float) and (value == default or abs(value) < 1e30)
        else:
            fits = default is None or isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind in (int, float)):
            raise CheckpointError(f"{where}: {name} is {value!r}; it must be {type_names[kind]}.")
        given[name] = float(value) if kind is float else value
    timesteps, offset = given["num_train_timesteps"], given.get("steps_offset", 0)
    if timesteps > MOST_TIMESTEPS:
        raise CheckpointError(f"{where}: num_train_timesteps is {timesteps}; it must be at most {MOST_TIMESTEPS}.")
    if not 0 <= offset < max(timesteps, 1):
        raise CheckpointError(f"{where}: steps_offset is {offset}; it must be from 0 to below {timesteps}.")
    return given


def _diffusion(given: Mapping[str, Any], where: str) -> Diffusion:
    timesteps, prediction = given["num_train_timesteps"], given.get("prediction_type", "flow_prediction")
    if prediction not in PREDICTIONS:
        raise CheckpointError(f"{where}: {unknown('prediction_type', prediction, PREDICTIONS)}")
    if "rho" in given:
        if prediction not in EDM_PREDICTIONS:
            raise CheckpointError(
                f"{where}: prediction_type is {prediction}; for EDM networks, ldm reads only {' and '.join(EDM_PREDICTIONS)}."
            )
        levels = Karras(timesteps, given["sigma_min"], given["sigma_max"], given["rho"])
        return Diffusion(levels, EDM_PREDICTIONS[prediction](given["sigma_data"]))
    schedule = _schedule(given, where)
    if isinstance(schedule, FlowSchedule) != (prediction == "flow_prediction"):
        raise CheckpointError(
            f"{where}: prediction_type is {prediction}, which does not fit the schedule {schedule.kind}; "
            "flow_prediction requires use_flow_sigmas, and use_flow_sigmas requires flow_prediction."
        )
    if _is_continuous(given):
        ends = [given[name] or getattr(schedule, name) for name in ("sigma_min", "sigma_max")]
        return Diffusion(Karras(timesteps, *ends) if given["use_karras_sigmas"] else schedule, EdmV(1.0))
    return Diffusion(schedule, PREDICTIONS[prediction]())


def _is_continuous(given: Mapping[str, Any]) -> bool:
    """Return whether the network embeds ln(sigma) / 4 in place of the timestep; diffusers does so only for v_prediction."""
    return given.get("timestep_type") == "continuous" and given["prediction_type"] == "v_prediction"


def _schedule(given: Mapping[str, Any], where: str) -> Schedule:
    timesteps = given["num_train_timesteps"]
    if "shift" in given or given.get("use_flow_sigmas"):
        if timesteps != 1000:
            raise CheckpointError(f"{where}: num_train_timesteps is {timesteps}; for flow models it must be 1000.")
        return FlowSchedule(timesteps, given.get("shift", given.get("flow_shift")))
    if given["trained_betas"] is not None:
        raise CheckpointError(f"{where}: trained_betas is a custom schedule, which ldm does not read; set it to null.")
    if given["beta_schedule"] not in SCHEDULES:
        raise CheckpointError(f"{where}: {unknown('beta_schedule', given['beta_schedule'], SCHEDULES)}")
    kind = SCHEDULES[given["beta_schedule"]]
    ends = {} if kind is Cosine else {end: given[end] for end in ("beta_start", "beta_end")}
    return kind(num_timesteps=timesteps, zero_terminal_snr=given.get("rescale_betas_zero_snr", False), **ends)


def _spacing(name: str, given: Mapping[str, Any], where: str) -> str:
    if "shift" in given:
        return "linspace"
    if name == "LCMScheduler":
        return "trailing"
    if given.get("use_flow_sigmas"):
        return "sgm_uniform"
    key = "sigma_schedule" if "rho" in given else "timestep_spacing"
    choices = ("karras", "exponential") if "rho" in given else PLAIN
    if given[key] not in choices:
        raise CheckpointError(f"{where}: {unknown(key, given[key], choices)}")
    return next((spacing for flag, spacing in FLAGS.items() if given.get(flag)), str(given[key]))


def _ends_above_zero(name: str, given: Mapping[str, Any], where: str) -> bool:
    """Return whether the last noise level is above 0, as it always is for diffusers' DEIS, which cannot step to 0."""
    final = given.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise CheckpointError(f"{where}: {unknown('final_sigmas_type', final, ('zero', 'sigma_min'))}")
    return final == "sigma_min" or not given.get("set_alpha_to_one", True) or name == "DEISMultistepScheduler"


def _differences(name: str, given: Mapping[str, Any], sampling: SamplingConfig) -> Iterator[tuple[str, str]]:
    """Yield the settings for which ldm differs from diffusers, each with a sentence on the difference."""
    if name not in CLASSES:
        yield "_class_name", f"{name} is unknown; {sampling.sampler} is used instead."
    of_schedule = "rho" in given or (_is_continuous(given) and given["use_karras_sigmas"])
    edm = {"sigma_min", "sigma_max"} if of_schedule else set()  # they are the ends of the schedule
    for setting, (values, what) in OURS.items():
        if setting in given.keys() - edm and given[setting] not in values:
            yield setting, f"{setting} is {given[setting]!r}; {what}."
    if given.get("rho", 7.0) != 7.0:
        yield "rho", f"rho is {given['rho']:g}; the spacing karras uses 7 here."
    if name == "LCMScheduler":
        yield (
            "original_inference_steps",
            f"the timesteps are chosen among {given['original_inference_steps']}; with a number of steps that does not "
            "divide it, those of the spacing trailing differ a little.",
        )
    if name == "PNDMScheduler" and given["prediction_type"] != "epsilon":
        yield "prediction_type", "PNDM extrapolates the network output, plms here the predicted noise."
    if name in ("DDIMScheduler", "PNDMScheduler") and given["timestep_spacing"] != "leading":
        yield (
            "timestep_spacing",
            f"{name} always steps by T // n, here to the next timestep; they agree for leading.",
        )
    if given.get("shift", 1.0) != 1.0:
        yield "shift", f"shift is {given['shift']:g}; diffusers shifts the last noise level twice, ldm once."
    if name == "DPMSolverMultistepScheduler" and sampling.final == "sigma_min":
        yield "final_sigmas_type", "with fewer than 15 steps, the last step has order 1 in diffusers, order 2 here."
    for flag in (flag for flag in FLAGS if given.get(flag)):
        if "shift" in given:
            yield flag, "flow models use the spacing linspace here."
        elif flag == "use_beta_sigmas":
            yield flag, "the beta spacing applies to timesteps here, to noise levels in diffusers."
        elif SPECS[sampling.sampler].grid == "inner":
            yield flag, "the network gets fractional timesteps here, integer timesteps in diffusers."
        elif given["timestep_spacing"] != "linspace":
            yield (
                flag,
                f"the noise levels span the schedule here, in diffusers the timesteps of {given['timestep_spacing']}.",
            )


def _diffusion_values(diffusion: Diffusion) -> dict[str, Any]:
    """Return the diffusion as diffusers settings; only classes that have all of these settings can represent it."""
    schedule, parametrization = diffusion.schedule, diffusion.parametrization
    timesteps = {"num_train_timesteps": schedule.num_timesteps}
    prediction = next((key for key, kind in PREDICTIONS.items() if isinstance(parametrization, kind)), None)
    if isinstance(schedule, FlowSchedule) and isinstance(parametrization, Flow) and schedule.num_timesteps == 1000:
        return timesteps | {"shift": schedule.shift}
    if isinstance(parametrization, Edm):
        prediction = next(key for key, kind in EDM_PREDICTIONS.items() if type(parametrization) is kind)
    if isinstance(schedule, Karras) and isinstance(parametrization, Edm):
        levels = {name: getattr(schedule, name) for name in ("sigma_min", "sigma_max", "rho")}
        return timesteps | levels | {"sigma_data": parametrization.sigma_data, "prediction_type": prediction}
    continuous = {"timestep_type": "continuous"} if parametrization == EdmV(1.0) else {}
    if isinstance(parametrization, Edm) and not continuous:
        prediction = None  # with a table of betas, diffusers has no sigma_data
    betas = next((name for name, kind in SCHEDULES.items() if isinstance(schedule, kind)), None)
    if betas is None or prediction in (None, "flow_prediction") or not isinstance(schedule, BetaSchedule):
        raise CheckpointError(
            f"diffusers has no scheduler for the schedule {schedule.kind} of {schedule.num_timesteps} timesteps with the "
            f"parametrization {parametrization.kind}; write a native file."
        )
    ends = {end: getattr(schedule, end) for end in ("beta_start", "beta_end") if hasattr(schedule, end)}
    zero_snr = {"rescale_betas_zero_snr": True} if schedule.zero_terminal_snr else {}
    return timesteps | {"beta_schedule": betas} | ends | {"prediction_type": prediction} | continuous | zero_snr
