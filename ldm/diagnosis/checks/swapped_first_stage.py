"""First stage: whether it is the one that the denoiser was trained on."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.predecessors import differing, predecessor
from ldm.formats.checkpoint import LATENT_STATISTICS


@check(Topic.FIRST_STAGE, "first stage of the denoiser", stages=("denoiser",))
def swapped_first_stage(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare the first stage in the model, and the fingerprint that the denoiser was trained on, with the result of stage 1.

    Latents of another first stage mean nothing to the denoiser, even of one with the same config trained with another seed. If
    only the statistics of the latents differ, :mod:`ldm.diagnosis.checks.latent_statistics` judges them.
    """
    found = predecessor(run, "vae") if run.config.first_stage.has_weights else None
    if found is None or "first_stage" not in found.source.parts:
        return
    names = differing(run.stages["denoiser"].average, "first_stage.", found.source.part("first_stage").state)
    others = [name for name in names if name not in LATENT_STATISTICS]
    statistics_alone = bool(names) and not others
    yield Measured(
        f"fingerprint {found.fingerprint}, trained on {found.recorded}; {len(names)} weights of the model differ"
    )
    if others or (found.is_another and not statistics_alone):
        problem = (
            f"{len(others)} weights of the model's first stage are not those of {found.source.source}"
            if others
            else f"its fingerprint is {found.fingerprint}, but the denoiser was trained on {found.recorded}"
        )
        yield Finding(
            "first_stage_swapped",
            "the first stage is not the one that the denoiser was trained on",
            problem,
            "vae.checkpoint",
            "restore the first stage of the training, or train the denoiser on the new one, in another run_dir",
        )
