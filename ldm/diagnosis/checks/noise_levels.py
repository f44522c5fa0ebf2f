"""Sampling: where the noise levels of the sampler begin and end."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.checks.terminal_snr import LEAST_SIGMA
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diffusion import SPECS, sigmas

VISIBLE = 0.1
"""Noise level in a finished latent, of unit variance, from which it is visible: a signal-to-noise ratio of 20 dB."""


@check(Topic.SAMPLING, "noise levels of the sampler", stages=("denoiser",))
def noise_levels(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Check that sampling begins where the schedule ends, and ends without noise.

    The start is pure noise. A first level far below the last of the schedule tells the network that there is a signal, which it
    then finds in the noise. What remains at the last level stays in the image.
    """
    sampling, schedule = run.config.sampling, run.config.diffusion.schedule
    final = sampling.final_of(sampling.sampler)
    levels = sigmas(
        schedule,
        sampling.num_inference_steps,
        sampling.spacing,
        sampling.offset,
        final,
        sampling.shift,
        SPECS[sampling.sampler].grid,
    )
    first, last = float(levels[0]), float(levels[-1])
    text = (
        f"{len(levels) - 1} steps of {sampling.sampler} from sigma {first:.3g} to {last:.3g} (spacing {sampling.spacing}); "
        f"the schedule goes from {schedule.sigma_max:.3g} to {schedule.sigma_min:.3g}"
    )
    yield Measured(text)
    if first < LEAST_SIGMA and first < 0.5 * schedule.sigma_max:
        yield Finding(
            "sampler_starts_late",
            "the sampler does not start at the noise level that pure noise stands for",
            text,
            "denoiser.sampling.spacing",
            "use trailing or another spacing that begins at the last timestep",
        )
    if last > VISIBLE:
        yield Finding(
            "sampler_ends_early",
            "the sampler stops before the noise is removed",
            text,
            "denoiser.sampling.final",
            "set it to zero",
        )
