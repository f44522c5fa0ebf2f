"""Objective: whether the last timestep of the noise schedule is nearly pure noise."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun

LEAST_SIGMA = 5.0
"""Smallest terminal noise level that is accepted.

Sampling starts from pure noise, which the network must have seen in training. Stable Diffusion's schedule ends at 14.6, a signal
of 7 % of the amplitude, of which only the mean brightness is visible (Lin et al. 2305.08891); at 5 it is 20 %, three times as
much. Linear, cosine, flow and Karras schedules end far above.
"""


@check(Topic.OBJECTIVE, "terminal noise level", stages=("denoiser",))
def terminal_snr(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Check the last noise level of the schedule; see :data:`LEAST_SIGMA`."""
    schedule = run.config.diffusion.schedule
    sigma = schedule.sigma_max
    text = f"the schedule ends at sigma {sigma:.3g}, a signal of {(1 + sigma**2) ** -0.5:.1%} of the amplitude"
    yield Measured(text)
    if sigma < LEAST_SIGMA:
        yield Finding(
            "terminal_snr",
            "sampling starts from pure noise, which the network never saw in training",
            text,
            "denoiser.diffusion.schedule",
            "use a schedule that ends at sigma 14 or more, with num_timesteps 1000 or zero_terminal_snr, and train again",
        )
