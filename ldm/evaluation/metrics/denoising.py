"""Error of the denoiser by noise level, with fixed noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diagnosis.pool import Pool, denoised
from ldm.diffusion import Schedule, seeded_noise
from ldm.evaluation.intervals import mean_estimate
from ldm.evaluation.metric import Number, metric
from ldm.model import LatentDiffusion
from ldm.training.tasks.task import on_device

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject

LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Noise levels at which the error is measured, those of them that the schedule has."""


def levels_of(schedule: Schedule) -> list[float]:
    """Return the :data:`LEVELS` that are within a schedule."""
    least, most = (float(each) for each in schedule.sigma(torch.tensor([0.0, schedule.num_timesteps - 1.0])))
    return [level for level in LEVELS if least <= level <= most]


def encoded(model: LatentDiffusion, batch: Mapping[str, Any], seeds: Sequence[int]) -> Pool:
    """Encode the images of a batch and prepare its conditions; an image's own seed gives the noise of posterior and latent."""
    device = next(model.denoiser.parameters()).device
    image = batch["image"].to(device)
    noise = seeded_noise(seeds, model.latent_shape(*image.shape[2:]))
    latents = model.encode(image, noise(0.0, 0.0).to(device))
    defaults = model.config.conditioner.defaults(*image.shape[2:])
    full = on_device({**{name: [pair] * len(image) for name, pair in defaults.items()}, **batch}, device)
    generator = torch.Generator().manual_seed(seeds[0])
    prepared = on_device(dict(model.conditioner.prepare_batch(full, model.encode, generator)), torch.device("cpu"))
    keys = model.config.conditioner.input_keys
    return Pool(latents.cpu(), noise(0.0, 0.0), {key: prepared[key] for key in keys if key in prepared})


@torch.no_grad()
def relative_error(model: LatentDiffusion, pool: Pool, level: float) -> Tensor:
    """Return the mean squared error of the denoised latents of each image at one noise level, ``[n]``.

    The unit is the error s^2 / (1 + s^2) of the best linear denoiser of latents of unit variance: 1 means that nothing but their
    scale was learned. It does not depend on the parametrization, nor on the weighting of the training loss.
    """
    error = (denoised(model, pool, torch.tensor(level)) - pool.latents).square().flatten(1).mean(1)
    return error * (1 + level**2) / level**2


@metric("denoising", "denoiser")
def denoising(subject: Subject) -> Iterator[Number]:
    """Measure the error of the denoised latents at fixed noise levels; the i-th image has the noise of the seed plus i.

    It compares denoisers of one first stage, which the receipts name: other latents are more or less easy to denoise.
    """
    if subject.pipe is None:
        return
    model = subject.pipe.model
    levels = levels_of(model.diffusion.schedule)
    errors: dict[float, list[Tensor]] = {level: [] for level in levels}
    count = 0
    for batch in subject.measured():
        seeds = [subject.options.seed + count + i for i in range(len(batch["key"]))]
        pool = encoded(model, batch, seeds)
        count += len(seeds)
        for level in levels:
            errors[level].append(relative_error(model, pool, level))
    for level in levels:
        parameters = {"sigma": level, "unit": "s^2 / (1 + s^2)", "first_stage": subject.hash_of(model.first_stage)}
        values = torch.cat(errors[level]).double().numpy()
        yield Number(f"denoising_error@{level:g}", mean_estimate(values), count, "lower", parameters=parameters)
