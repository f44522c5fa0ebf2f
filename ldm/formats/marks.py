"""Marks of LDM files: small tensors and metadata that state what weights do not show.

| mark                                                   | states                                                            |
|--------------------------------------------------------|-------------------------------------------------------------------|
| tensor ``v_pred``                                      | v prediction                                                      |
| tensor ``ztsnr``                                       | zero terminal SNR (Lin et al. 2305.08891), which requires v       |
| tensors ``edm_mean``, ``edm_std``                      | EDM with sigma_data 0.5, latent statistics (Playground 2.5)       |
| tensors ``edm_vpred.sigma_max``, ``.sigma_min``        | v prediction at ln(sigma) / 4 (CosXL)                             |
| tensors ``betas``, ``alphas_cumprod``, ``denoiser.sigmas`` | the noise schedule                                            |
| tensor ``scale_factor``                                | scaling factor of the latents                                     |
| ``modelspec.prediction_type``, ``modelspec.predict_key`` | prediction type                                                 |
| ``modelspec.architecture``                             | v prediction, if it is ``stable-diffusion-v2-768-v``              |
| ``modelspec.encoder_layer``                            | hidden state of the text encoder of SD 1 ("clip skip")            |
| ``modelspec.timestep_range``                           | timesteps of the training                                         |
| ``ss_v_parameterization``, ``ss_zero_terminal_snr``    | v prediction and zero terminal SNR, in kohya's metadata           |

The tensors may stand under any prefix. Their names and meanings are those of ComfyUI, sgm, kohya's sd-scripts and
Stability's model metadata standard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion import Diffusion, Schedule
from ldm.diffusion.parametrization import X0, Edm, EdmV, Eps, Parametrization, V
from ldm.diffusion.schedule import BetaSchedule, Cosine, Karras, Linear, ScaledLinear
from ldm.errors import CheckpointError, unknown
from ldm.formats.folding import SCALE_FACTOR, scale_from, shortest
from ldm.model import SamplingConfig

TENSORS = (
    "v_pred",
    "ztsnr",
    "edm_mean",
    "edm_std",
    "edm_vpred.sigma_max",
    "edm_vpred.sigma_min",
    "betas",
    "alphas_cumprod",
    "denoiser.sigmas",
    SCALE_FACTOR,
)
"""Names of the tensors that are marks."""

TABLES = ("alphas_cumprod", "betas", "denoiser.sigmas")
"""Tables of the noise schedule; the first that a file has is read."""

NAMES = re.compile(rf"(?:.+\.)?({'|'.join(map(re.escape, TENSORS))})")
UNKNOWN = re.compile(r"edm_\w+(?:\.\w+)?|\w+_pred|\w*snr|(?:sigma|prediction|pred)_\w+")
"""Names that look like marks of the prediction or the noise; one that is not known is rejected."""

OPTIONS: Mapping[str, type[Parametrization]] = {"epsilon": Eps, "eps": Eps, "v_prediction": V, "v": V}
"""Parametrization for each value of the option ``prediction_type``."""

PREDICTION_TYPES = {**OPTIONS, "v_pred": V, "vpred": V, "eps_pred": Eps, "noise": Eps, "sample": X0, "x0": X0}
"""Parametrization for each value of the metadata, in lower case and with underscores."""

PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
ARCHITECTURE, V_ARCHITECTURE = "modelspec.architecture", "stable-diffusion-v2-768-v"
ENCODER_LAYER, TIMESTEPS = "modelspec.encoder_layer", "modelspec.timestep_range"
KOHYA_V, KOHYA_ZERO_SNR = "ss_v_parameterization", "ss_zero_terminal_snr"
METADATA = (*PREDICTION_KEYS, ARCHITECTURE, ENCODER_LAYER, TIMESTEPS, KOHYA_V, KOHYA_ZERO_SNR)
"""Keys of the metadata that are marks."""

HIDDEN_STATES = {"1": "last", "2": "penultimate"}
"""Hidden state for each value of ``modelspec.encoder_layer`` that ldm's text encoder has."""

BY_DEFAULT = "by default; if images are brown and blurred, pass prediction_type='v_prediction'"
PLAYGROUND = Diffusion(Karras(), Edm(0.5))
PLAYGROUND_SCALE = 0.5
"""Scaling factor of the latents of a file with ``edm_mean`` and ``edm_std``, in addition to these."""

SAMPLED_EDM = SamplingConfig("dpmpp_2m", 50, 3.0, "karras")
SAMPLED_EDM_V = SamplingConfig("euler", 50, 5.0, "exponential")
TOLERANCE = 2e-3
"""Largest difference of sqrt(abar) from a known schedule; tables in half precision differ by 1e-3."""


@dataclass(frozen=True)
class Marks:
    """What the marks of a file state.

    Attributes:
        diffusion: schedule and parametrization.
        stated: whether the file or the caller states the prediction type; else it is epsilon.
        notes: a sentence for each mark.
        scale: scaling factor of the latents; None if it is not stated.
        mean, std: latent statistics ``[c]`` in addition to the scale, of which None are stated together.
        hidden_state: hidden state of a text encoder of SD 1; None if it is not stated.
        names: names of the marks, of tensors and metadata.
    """

    diffusion: Diffusion
    stated: bool
    notes: tuple[str, ...]
    scale: float | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    hidden_state: str | None = None
    names: tuple[str, ...] = ()

    def sampling(self, usual: SamplingConfig) -> SamplingConfig:
        """Return the defaults of sampling, which for most diffusions are the ``usual`` ones of the family."""
        schedule, parametrization = self.diffusion.schedule, self.diffusion.parametrization
        if isinstance(parametrization, Edm):
            return SAMPLED_EDM_V if isinstance(parametrization, EdmV) else SAMPLED_EDM
        # The spacing leading never begins at the last timestep, pure noise (Lin et al. 2305.08891, section 3.3).
        zero_snr = isinstance(schedule, BetaSchedule) and schedule.zero_terminal_snr
        return replace(usual, spacing="trailing", offset=0) if zero_snr else usual


def without_marks(tensors: Mapping[str, Tensor], path: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide the tensors of a file into its marks, without prefixes, and all others.

    Raises:
        CheckpointError: a name looks like a mark of the prediction, but is not known.
    """
    marks, others = {}, {}
    for name, tensor in tensors.items():
        found = NAMES.fullmatch(name) if name.endswith(TENSORS) else None
        if found and (found[1] not in TABLES or bool(tensor.any())):  # else a buffer that was never filled
            marks[found[1]] = tensor
            continue
        if found is None and UNKNOWN.fullmatch(name):
            raise CheckpointError(
                f"{path} holds {name}, which ldm does not know and which seems to state what the network predicts; use "
                "a file without it, or a diffusers folder, whose scheduler_config.json states that."
            )
        others[name] = tensor
    return marks, others


def read_marks(
    path: object, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], requested: str | None
) -> Marks:
    """Read the marks of a file.

    Args:
        path: the file, for error messages.
        tensors: its marks, from :func:`without_marks`.
        metadata: its metadata.
        requested: prediction type that overrides that of the file; None for none.

    Raises:
        CheckpointError: a mark has no meaning, or two marks contradict each other.
    """
    schedule, notes = _schedule(path, tensors)
    stated = dict(_predictions(path, tensors, metadata, requested))
    zero_snr = {
        "the tensor ztsnr": "ztsnr" in tensors,
        f"the metadata {KOHYA_ZERO_SNR}": _is_true(metadata.get(KOHYA_ZERO_SNR)),
        "the noise schedule": schedule.zero_terminal_snr,
    }
    reason = next((each for each, says in zero_snr.items() if says), None)
    if reason is not None:
        notes.append(f"the terminal SNR is zero, by {reason}")
        schedule = replace(schedule, zero_terminal_snr=True)
        if requested is None and not stated:
            stated = {reason: V}
    if requested is not None:
        if requested not in OPTIONS:
            raise CheckpointError(unknown("prediction_type", requested, OPTIONS))
        stated = {"request": OPTIONS[requested]}
    if len(set(stated.values())) > 1:
        says = ", but ".join(f"{kind.kind} by {each}" for each, kind in stated.items())
        raise CheckpointError(f"{path}: the network predicts {says}; pass prediction_type to decide.")
    kind, by = next(((kind, f"by {each}") for each, kind in stated.items()), (Eps, BY_DEFAULT))
    by = "as requested" if requested is not None else by
    if reason is not None and kind is Eps:
        raise CheckpointError(
            f"{path}: the network predicts epsilon {by}, but the terminal SNR is zero by {reason}, which requires v; "
            "pass prediction_type='v_prediction', or use another file."
        )
    diffusion = _edm(path, tensors, kind) or Diffusion(schedule, kind())
    notes.append(f"the prediction type is {diffusion.parametrization.kind}, {by}")
    mean, std = _statistics(path, tensors)
    if mean is not None:
        notes.append("the latents have a mean and a deviation per channel, by the tensors edm_mean and edm_std")
    if TIMESTEPS in metadata:
        notes.append(f"the timesteps of the training are {metadata[TIMESTEPS]}, by the metadata {TIMESTEPS}")
    layer = metadata.get(ENCODER_LAYER)
    if layer is not None:
        notes.append(
            f"the hidden state of the text encoder is number {layer} from the end, by the metadata {ENCODER_LAYER}, which "
            "is used for 1 and 2 in SD 1 alone"
        )
    return Marks(
        diffusion,
        bool(stated),
        tuple(notes),
        _scale(path, tensors) or (PLAYGROUND_SCALE if mean is not None else None),
        mean,
        std,
        HIDDEN_STATES.get(layer or ""),
        names_of(tensors, metadata),
    )


def names_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of all marks of a file: of the tensors that are marks, and of metadata."""
    return (*tensors, *(key for key in METADATA if key in metadata))


def tensors_for(diffusion: Diffusion, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors that state a diffusion, as far as there are any; the inverse of :func:`read_marks`.

    Those that have no values are of ``dtype``, that of the weights.
    """
    schedule, parametrization = diffusion.schedule, diffusion.parametrization
    empty = torch.empty(0, dtype=dtype, device="cpu")
    marks = {"v_pred": empty} if parametrization == V() else {}
    if isinstance(schedule, Karras) and parametrization == EdmV(1.0):
        ends = {"sigma_max": schedule.sigma_max, "sigma_min": schedule.sigma_min}
        return {
            f"edm_vpred.{name}": torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in ends.items()
        }
    if isinstance(schedule, BetaSchedule):
        if schedule.zero_terminal_snr:
            marks["ztsnr"] = empty
        if replace(schedule, zero_terminal_snr=False) != ScaledLinear():
            marks["betas"] = schedule.betas.float()
    return marks


def statistics_for(diffusion: Diffusion, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that state the latent statistics of a first stage, if readers expect them with this diffusion."""
    if diffusion != PLAYGROUND:
        return {}
    return {"edm_mean": state["latent_mean"], "edm_std": state["latent_std"] * PLAYGROUND_SCALE}


def metadata_for(diffusion: Diffusion, hidden_state: str | None = None) -> dict[str, str]:
    """Return the metadata that states a diffusion, and the hidden state of a text encoder of SD 1.

    A parametrization that no mark states has a name there that only ldm knows.
    """
    kind = type(diffusion.parametrization)
    names: dict[type[Parametrization], str] = {Eps: "epsilon", V: "v", X0: "sample"}
    if diffusion == PLAYGROUND or "edm_vpred.sigma_max" in tensors_for(diffusion):
        names |= {Edm: "epsilon", EdmV: "v"}
    stated = {PREDICTION_KEYS[0]: names.get(kind, kind.kind)}
    layers = {state: layer for layer, state in HIDDEN_STATES.items()}
    return stated | ({ENCODER_LAYER: layers[hidden_state]} if hidden_state else {})


def _predictions(
    path: object, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], requested: str | None
) -> Iterator[tuple[str, type[Parametrization]]]:
    """Yield each place that states the prediction type, and the parametrization."""
    for key in PREDICTION_KEYS:
        value = metadata.get(key, "").lower().replace("-", "_")
        if value in PREDICTION_TYPES:
            yield f"the metadata {key}", PREDICTION_TYPES[value]
        elif value not in ("", "none") and requested is None:
            raise CheckpointError(
                f"{path}: its metadata {key} is {value[:100]!r}, which ldm does not know; pass prediction_type."
            )
    if metadata.get(ARCHITECTURE, "").startswith(V_ARCHITECTURE):
        yield f"the metadata {ARCHITECTURE}", V
    if _is_true(metadata.get(KOHYA_V)):
        yield f"the metadata {KOHYA_V}", V
    if "v_pred" in tensors:
        yield "the tensor v_pred", V
    if "edm_vpred.sigma_max" in tensors:
        yield "the tensor edm_vpred.sigma_max", V
    if "edm_mean" in tensors:
        yield "the tensor edm_mean", Eps


def _edm(path: object, tensors: Mapping[str, Tensor], kind: type[Parametrization]) -> Diffusion | None:
    """Return the diffusion of a network that embeds ln(sigma) / 4; None for any other."""
    levels = {name: tensors.get(f"edm_vpred.{name}") for name in ("sigma_min", "sigma_max")}
    if levels["sigma_max"] is None and levels["sigma_min"] is not None:
        raise CheckpointError(f"{path} has edm_vpred.sigma_min, but no edm_vpred.sigma_max; download the file again.")
    if levels["sigma_max"] is None and "edm_mean" not in tensors:
        return None
    edm = {Eps: Edm, V: EdmV}[kind]
    if levels["sigma_max"] is None:
        return replace(PLAYGROUND, parametrization=edm(0.5))
    try:
        usual = Karras()
        ends = [
            shortest(tensor.flatten()[0]) if tensor is not None and scale_from(tensor) else usual.sigma_min
            for tensor in levels.values()
        ]
        return Diffusion(Karras(usual.num_timesteps, *ends), edm(1.0))
    except ValueError as error:
        raise CheckpointError(f"{path}: edm_vpred does not give two noise levels: {error}.") from None


def _statistics(path: object, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    found = {name: tensors[name].float().flatten() for name in ("edm_mean", "edm_std") if name in tensors}
    if not found:
        return None, None
    mean, std = found.get("edm_mean"), found.get("edm_std")
    if (
        mean is None
        or std is None
        or mean.shape != std.shape
        or not (mean.isfinite() & std.isfinite() & (std > 0)).all()
    ):
        raise CheckpointError(
            f"{path}: edm_mean and edm_std are not a finite mean and deviation per channel; download the file again."
        )
    return mean, std


def _scale(path: object, tensors: Mapping[str, Tensor]) -> float | None:
    """Return the scaling factor of the latents that a file states, or None.

    Raises:
        CheckpointError: it is not one finite number above 0.
    """
    stored = tensors.get(SCALE_FACTOR)
    if stored is None:
        return None
    try:
        return scale_from(stored)
    except (ValueError, RuntimeError):
        values = stored.flatten()[:3].tolist()
        raise CheckpointError(
            f"{path}: {SCALE_FACTOR} is {values}, not one number above 0; download the file again."
        ) from None


def _schedule(path: object, tensors: Mapping[str, Tensor]) -> tuple[BetaSchedule, list[str]]:
    """Return the schedule whose table a file has, and a note on it; without a table, that of Stable Diffusion."""
    name = next((name for name in TABLES if name in tensors), None)
    if name is None:
        return ScaledLinear(), []
    table = tensors[name].double().flatten()
    signal = {
        "alphas_cumprod": table,
        "betas": (1 - table).cumprod(0),
        "denoiser.sigmas": (1 / (1 + table**2)).sort(descending=True).values,
    }[name].clamp(0, 1)
    betas = tensors.get(
        "betas", torch.stack([1 - signal[0], 1 - signal[-1] / signal[-2]]) if len(signal) > 1 else signal
    )
    schedule = next((each for each in _candidates(len(signal), betas) if _fits(each, signal)), None)
    if schedule is None:
        raise CheckpointError(
            f"{path}: its noise schedule ({name}, of {len(table)} timesteps) is none that ldm knows; convert it to a "
            "diffusers folder, whose scheduler_config.json states the schedule."
        )
    return schedule, [f"the noise schedule is {schedule.kind}, by the tensor {name}"]


def _candidates(timesteps: int, betas: Tensor) -> Iterator[BetaSchedule]:
    """Yield the schedules that a table of so many timesteps, between the first and the last of these betas, may be of."""
    if timesteps < 2 or not betas.isfinite().all():
        return
    for zero_snr in (False, True):
        yield ScaledLinear(timesteps, zero_snr)
        yield Cosine(timesteps, zero_snr)
    start, end = (shortest(betas.flatten()[i]) for i in (0, -1))
    if 0 < start <= end < 1:
        for kind in (ScaledLinear, Linear):
            yield kind(timesteps, False, start, end)


def _fits(schedule: Schedule, signal: Tensor) -> bool:
    difference = schedule.alphas_cumprod.sqrt() - signal.sqrt()
    return bool(difference.abs().max() < TOLERANCE)


def _is_true(value: str | None) -> bool:
    return str(value).lower() in ("true", "1")
