"""Latents: whether the stored mean and standard deviation are those of the latents."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun


@check(Topic.LATENTS, "statistics of the latents", stages=("denoiser",))
def latent_statistics(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare the latents of training images, normalized by the stored mean and standard deviation, with zero and one.

    The noise schedule, the scalings of the network and the loss assume unit variance. The root mean square of all normalized
    latents is judged, mean included. It is 1 for statistics that stage 1 has measured on these images; published first stages
    on other images stay within some tens of percent. A factor of 2 in scale is one of 4 in the signal-to-noise ratio of every
    timestep, more than the difference between the usual schedules, and counts as a fault.
    """
    if not run.config.first_stage.has_weights:
        return
    latents, stage = run.pool("train").latents.double(), run.first_stage
    assert stage is not None
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    rms = float(latents.square().mean().sqrt())
    text = (
        f"normalized latents have mean {float(mean.min()):.2f} to {float(mean.max()):.2f} and standard deviation "
        f"{float(std.min()):.2f} to {float(std.max()):.2f} by channel, root mean square {rms:.2f}"
    )
    yield Measured(text)
    if 0.5 < rms < 2.0:
        return
    plain = bool((stage.latent_mean == 0).all() and (stage.latent_std == 1).all())
    uniform = bool((stage.latent_std == stage.latent_std[0]).all() and (stage.latent_mean == 0).all())
    raw = stage.denormalize(latents.float().to(stage.latent_mean.device)).cpu()
    yield Finding(
        "latents_not_normalized" if plain else "latent_scale",
        "the latents are not normalized" if plain else "the stored scale of the latents is not that of these latents",
        f"{text}; unnormalized ones have standard deviation {float(raw.std()):.3g}"
        + (f", the stored one is {float(stage.latent_std[0]):.3g}" if uniform else ""),
        "vae.checkpoint" if run.experiment.vae.train is None else "vae.train",
        "let stage vae end, which measures them, or convert the first stage with its scale; then train the denoiser again",
    )
