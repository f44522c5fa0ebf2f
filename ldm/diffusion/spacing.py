"""Spacings: the noise levels at which a sampler evaluates the network, chosen from a schedule or given by the caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.schedule import Flow, Schedule, interpolate, karras_levels
from ldm.errors import SamplingError, unknown

Final = Literal["zero", "sigma_min"]
"""Last noise level of a sampling: 0, or that of timestep 0, as in Stable Diffusion's ddim and plms."""


Grid = Literal["fractional", "rounded", "inner"]
"""Interpretation of the spacings ``leading`` and ``linspace`` by a family of solvers.

``fractional``: as they are (k-diffusion); ``rounded``: rounded to whole timesteps (DDIM, DDPM, PLMS); ``inner``: computed
with one additional step, whose last timestep is dropped, and rounded (DPM-Solver++, UniPC, DEIS).
"""


def leading(schedule: Schedule, n: int, offset: int) -> Tensor:
    """Every (T // n)-th timestep, counted up from ``offset`` (1 for Stable Diffusion); does not reach the last timesteps."""
    return torch.arange(n, device="cpu").flip(0) * (schedule.num_timesteps // n) + offset


def trailing(schedule: Schedule, n: int, offset: int) -> Tensor:
    """Every (T / n)-th timestep, counted down from the last, rounded (Lin et al. 2305.08891, section 3.3)."""
    last = float(schedule.num_timesteps)
    down = (last - last / n) - last  # as in numpy.arange, whose rounding decides in diffusers which way halves go
    return (last + down * torch.arange(n, dtype=torch.float64, device="cpu")).round() - 1


def linspace(schedule: Schedule, n: int, offset: int) -> Tensor:
    """Evenly spaced timesteps from the last to 0, fractional, as in k-diffusion."""
    return torch.linspace(schedule.num_timesteps - 1, 0, n, dtype=torch.float64, device="cpu")


def karras(schedule: Schedule, n: int, offset: int) -> Tensor:
    """Levels from sigma_max to sigma_min, evenly spaced in sigma^(1/7) (Karras et al. 2206.00364, equation 5)."""
    return schedule.t(karras_levels(schedule.sigma_max, schedule.sigma_min, 7.0, n))


def exponential(schedule: Schedule, n: int, offset: int) -> Tensor:
    """Levels from sigma_max to sigma_min, evenly spaced in ln sigma (k-diffusion's ``get_sigmas_exponential``)."""
    ends = (math.log(schedule.sigma_max), math.log(schedule.sigma_min))
    return schedule.t(torch.linspace(*ends, n, dtype=torch.float64, device="cpu").exp())


def sgm_uniform(schedule: Schedule, n: int, offset: int) -> Tensor:
    """``linspace`` with one additional step, whose last timestep is dropped (Stability's generative-models)."""
    return linspace(schedule, n + 1, offset)[:-1]


def beta(schedule: Schedule, n: int, offset: int) -> Tensor:
    """Quantiles of Beta(0.6, 0.6) over the timesteps, denser at both ends (Lee et al. 2407.12173)."""
    quantiles = 1 - torch.arange(n, dtype=torch.float64, device="cpu") / n
    angle = torch.linspace(0, math.pi / 2, 10_001, dtype=torch.float64, device="cpu")  # u = sin^2: no pole to sum over
    middle = (angle[1:] + angle[:-1]) / 2
    share = ((middle.sin() * middle.cos()) ** 0.2).cumsum(0)
    cumulative = torch.cat([share.new_zeros(1), share / share[-1]])
    return interpolate(quantiles, cumulative, angle.sin() ** 2) * (schedule.num_timesteps - 1)


SPACINGS: dict[str, Callable[[Schedule, int, int], Tensor]] = {
    spacing.__name__: spacing for spacing in (leading, trailing, linspace, karras, exponential, sgm_uniform, beta)
}
"""Name to ``(schedule, n, offset) -> timesteps [n]``, decreasing; only ``leading`` uses the offset."""


def timesteps(
    schedule: Schedule, n: int, spacing: str = "trailing", offset: int = 0, grid: Grid = "fractional"
) -> Tensor:
    """Return the timesteps of ``n`` sampling steps: [n] fp64, decreasing, possibly fractional.

    Args:
        schedule: the noise schedule that the network was trained with.
        n: number of steps, 1 or more.
        spacing: a name of ``SPACINGS``.
        offset: added to the timesteps of ``leading`` (diffusers' ``steps_offset``; 1 for Stable Diffusion).
        grid: how ``leading`` and ``linspace`` are interpreted; see :class:`ldm.diffusion.SamplerSpec`.

    Raises:
        SamplingError: unknown spacing, or more steps than the schedule has timesteps.
    """
    if spacing not in SPACINGS:
        raise SamplingError(unknown("spacing", spacing, SPACINGS))
    if n < 1:
        raise SamplingError(f"num_inference_steps is {n}; it must be 1 or more.")
    grid = grid if spacing in ("leading", "linspace") else "fractional"
    result = SPACINGS[spacing](schedule, n + (grid == "inner"), offset)[:n].double()
    result = result if grid == "fractional" else result.round()
    if not _falls(result) or result[0] > schedule.num_timesteps - 1:
        raise SamplingError(
            f"{n} steps of spacing {spacing!r} and offset {offset} do not fit into {schedule.num_timesteps} "
            "timesteps; ask for fewer steps, or for spacing 'karras'."
        )
    return result


def sigmas(
    schedule: Schedule,
    n: int,
    spacing: str = "trailing",
    offset: int = 0,
    final: Final = "zero",
    shift: float = 1.0,
    grid: Grid = "fractional",
) -> Tensor:
    """Return the noise levels of ``n`` sampling steps: [n + 1] fp32 on the CPU, decreasing.

    ``shift`` multiplies them (Esser et al. 2403.03206, section 5.3.2), in addition to the shift of the schedule itself;
    only flow schedules, which reach pure noise, support it.

    The last level is 0. With ``final="sigma_min"`` it is that of timestep 0, where Stable Diffusion's ddim and plms
    end (diffusers' ``set_alpha_to_one=False``); :meth:`Diffusion.finish` then gives what they return.

    Raises:
        SamplingError: as :func:`timesteps`; a shift for a schedule other than flow, or one so large that levels coincide.
    """
    levels = sigmas_from_timesteps(schedule, timesteps(schedule, n, spacing, offset, grid), final)
    if shift == 1:
        return levels
    if not isinstance(schedule, Flow):
        raise SamplingError(f"the shift {shift} needs a flow schedule; omit it, or choose another spacing.")
    levels = (shift * levels).clamp(max=schedule.sigma_max)
    if shift <= 0 or not _falls(levels):
        raise SamplingError(f"the shift {shift} leaves no room for {n} steps; choose one nearer to 1, or fewer steps.")
    return levels


def sigmas_from_timesteps(schedule: Schedule, timesteps: Sequence[float] | Tensor, final: Final = "zero") -> Tensor:
    """Return the noise levels of the given timesteps, followed by the final one of :func:`sigmas`: [n + 1] fp32 on the CPU.

    Raises:
        SamplingError: there is no timestep, they do not decrease, or the schedule does not have them.
    """
    t = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
    levels = schedule.sigma(t)
    if len(t) < 1 or not _falls(levels) or not 0 <= t[-1] <= t[0] <= schedule.num_timesteps - 1:
        raise SamplingError(
            f"timesteps {_shown(t)} do not fit the schedule; "
            f"give one or more falling numbers from {schedule.num_timesteps - 1} down to 0."
        )
    last = torch.zeros(1, dtype=torch.float32, device="cpu") if final == "zero" else schedule.table[:1]
    if len(levels) > 1 and levels[-1] <= last * (1 + 1e-6):
        levels = levels[:-1]  # the final level is already reached
    return torch.cat([levels, last]).float()


def sigmas_from_values(schedule: Schedule, values: Sequence[float] | Tensor) -> Tensor:
    """Return the given noise levels, with a 0 appended if it is missing: [n + 1] fp32 on the CPU.

    Published lists are rounded, so the largest level may exceed ``sigma_max`` by one percent. For levels below
    ``sigma_min`` the network receives timestep 0.

    Raises:
        SamplingError: there is no noise level, they do not decrease, or they exceed the schedule's largest.
    """
    sigma = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if len(sigma) and sigma[-1] == 0:
        sigma = sigma[:-1]
    if len(sigma) < 1 or not _falls(sigma) or not 0 < sigma[-1] <= sigma[0] <= 1.01 * schedule.sigma_max:
        raise SamplingError(
            f"sigmas {_shown(sigma)} do not fit the schedule; "
            f"give one or more falling numbers from {schedule.sigma_max:.6g} down to above 0."
        )
    return torch.cat([sigma, torch.zeros(1, dtype=torch.float32, device="cpu")]).float()


def _falls(x: Tensor) -> bool:
    return bool((x[:-1] > x[1:]).all())


def _shown(x: Tensor) -> str:
    return "[" + ", ".join(f"{value:g}" for value in x.tolist()) + "]"
