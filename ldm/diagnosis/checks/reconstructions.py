"""First stage: how well it reconstructs real images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ldm.diagnosis.check import Clock, Figure, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.pool import CHUNK
from ldm.diagnosis.statistics import paired
from ldm.vae.metrics import psnr

SHOWN = 8


@check(Topic.FIRST_STAGE, "reconstructions of the first stage", stages=("vae", "denoiser"))
def reconstructions(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare reconstructions with two that need no training.

    An image scaled down and up by the factor of the first stage has as many positions as the latents, with 3 channels. A first
    stage that is not better than this has not learned to use its latents; generated images are never better than
    reconstructions. One that is not even better than the mean color of each image gives noise or fog for any latent.
    """
    stage = run.first_stage
    if stage is None or not run.experiment.vae.model.has_weights:
        return
    image = run.images("val" if run.validates else "train")["image"]
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        for number, part in enumerate(image.split(CHUNK)):
            if number and clock.expired:
                break
            parts.append(stage.decode(stage.encode(part.to(run.device)).mode).float().clamp(-1, 1).cpu())
    made = torch.cat(parts)
    image = image[: len(made)]
    pooled = F.interpolate(F.avg_pool2d(image, stage.factor), scale_factor=stage.factor, mode="bilinear")
    mean = image.mean((2, 3), keepdim=True).expand_as(image)
    own, simple, flat = psnr(image, made), psnr(image, pooled), psnr(image, mean)
    text = (
        f"PSNR {float(own.mean()):.1f} dB; scaled down and up by {stage.factor}: {float(simple.mean()):.1f} dB; "
        f"mean color: {float(flat.mean()):.1f} dB"
    )
    yield Measured(text)
    yield Figure.of("images above their reconstructions", torch.cat([image[:SHOWN], made[:SHOWN]]), SHOWN)
    trained = run.experiment.vae.train is not None
    key = "vae.train.max_steps" if trained else "vae.checkpoint"
    if paired(flat, own).z > 0 or paired(simple, own).is_greater:
        yield Finding(
            "first_stage_untrained",
            "the first stage does not reconstruct the images",
            text,
            key,
            "train the first stage longer, until you cannot tell reconstructions apart at a glance, then the later stages again"
            if trained
            else "use a first stage that was trained on such images",
        )
