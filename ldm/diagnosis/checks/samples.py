"""Sampling: generated images against real ones, with the settings of the run and with other settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.diagnosis.check import Clock, Figure, Finding, Item, Measured, Topic, check
from ldm.diagnosis.features import distance, reference
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.pool import Pool, denoised
from ldm.diagnosis.pool import noise_levels as examined_levels
from ldm.diagnosis.statistics import paired
from ldm.modalities.arguments import pipeline_arguments
from ldm.pipeline import Pipeline

COUNT = 24
SHOWN = 8

USUAL_GUIDANCE = (1.0, 15.0)
"""Guidance scales in use; larger ones are never better, and below 1 the condition counts less than without guidance."""

USUAL_STEPS = 20
"""Steps with which every solver of the package is close to its limit."""

UNUSUAL_STEPS = 10
"""Steps below which only models that were distilled for it are sampled."""


@dataclass(frozen=True)
class Alternative:
    """Other settings, and the fault that they would be the remedy of."""

    cause: str
    problem: str
    key: str
    remedy: str
    settings: Mapping[str, Any] = field(hash=False)
    margin: float
    """Factor by which it must bring the images nearer to real ones: 1 if the setting of the run is outside of what is usual."""


def alternatives(run: OpenedRun) -> list[Alternative]:
    """Return settings that differ from those of the run in one respect each."""
    sampling, found = run.config.sampling, []
    if sampling.guidance_scale > USUAL_GUIDANCE[1]:
        found.append(
            Alternative(
                "guidance_scale",
                f"the guidance scale {sampling.guidance_scale:g} is too high",
                "denoiser.sampling.guidance_scale",
                "set it to 2 to 7",
                {"guidance_scale": 4.0},
                margin=1.0,
            )
        )
    if sampling.num_inference_steps < USUAL_STEPS:
        found.append(
            Alternative(
                "too_few_steps",
                f"{sampling.num_inference_steps} sampling steps are too few",
                "denoiser.sampling.num_inference_steps",
                "set it to 20 to 50",
                {"num_inference_steps": 2 * USUAL_STEPS},
                margin=1.0 if sampling.num_inference_steps < UNUSUAL_STEPS else 2.0,
            )
        )
    found.append(
        Alternative(
            "sampler",
            f"the sampler {sampling.sampler} with the spacing {sampling.spacing} does not suit the model",
            "denoiser.sampling.sampler",
            "set it to euler with the spacing trailing",
            {"sampler": "euler", "spacing": "trailing"},
            margin=2.0,
        )
    )
    return found


@check(Topic.SAMPLING, "generated images", weight=8, stages=("denoiser",))
def samples(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare generated images with real ones by statistics that noise, fog and saturation change.

    With each alternative, the same images (conditions and seeds) are generated again. A setting is the cause if another value
    brings the images significantly nearer to real ones, by more than the margin of the alternative: a setting that is unusual
    needs only be worse, others twice as far from real images. Teacher-forced denoising, of
    true latents with noise, shows what the network can do without the errors of sampling.
    """
    if run.config.size == (1, 1):  # points of a toy set
        return
    sampling, pool = run.config.sampling, run.pool("train")
    conditional = bool(run.config.conditioner.input_keys)
    real = reference(run.images("train")["image"])
    pipe, count = Pipeline(run.averaged), min(COUNT, len(pool))
    start = clock.left
    made = generate(pipe, pool, 1, {})
    count = max(4, min(count, int(clock.left / 5 / max(1e-3, start - clock.left))))
    made = generate(pipe, pool, count, {})
    own = distance(made, real)
    shown = {"generated with the settings of the run": made}
    distances = {each: Tensor() for each in alternatives(run)}
    for each in list(distances):
        shown[f"with {_settings_text(each.settings)}"] = images = generate(pipe, pool, count, each.settings)
        distances[each] = distance(images, real)
    level = examined_levels(run.averaged)[len(examined_levels(run.averaged)) // 2]
    part = pool.take(torch.arange(count).numpy())
    with torch.no_grad():
        forced = run.averaged.decode(denoised(run.averaged, part, level).to(run.device)).float().cpu()
    shown[f"true latents with noise of sigma {float(level):.2g}, denoised in one step"] = forced
    text = f"squared distance from real images {float(own.mean()):.2g} with the settings of the run"
    for each, values in distances.items():
        text += f", {float(values.mean()):.2g} with {_settings_text(each.settings)}"
    text += f"; {float(distance(forced, real).mean()):.2g} for true latents denoised in one step; 1 for real images"
    yield Measured(text)
    for caption, images in shown.items():
        yield Figure.of(caption, images[:SHOWN], SHOWN)
    if conditional and sampling.guidance_scale < USUAL_GUIDANCE[0]:
        yield Finding(
            "guidance_scale",
            f"the guidance scale {sampling.guidance_scale:g} makes the images ignore their conditions",
            "1 is the trained model, 0 the unconditional one",
            "denoiser.sampling.guidance_scale",
            "set it to 2 to 7",
        )
    better = {each: values for each, values in distances.items() if _is_better(values, own, each.margin)}
    if better:
        best = min(better, key=lambda each: float(better[each].mean()))
        yield Finding(best.cause, best.problem, text, best.key, best.remedy)


def generate(pipe: Pipeline, pool: Pool, count: int, settings: Mapping[str, Any]) -> Tensor:
    """Generate images for the conditions of the first samples, each with its own seed: ``[n c h w]`` in [-1, 1]."""
    conditions = {key: values[:count] for key, values in pool.conditions.items()}
    arguments = pipeline_arguments(conditions) if conditions else {"num_images_per_prompt": count}
    made = pipe(**arguments, **settings, seed=0, output_type="pt", batch_size=count, progress=False)
    return made.float().cpu() * 2 - 1


def _is_better(other: Tensor, own: Tensor, margin: float) -> bool:
    """Return whether the own distances are significantly more than ``margin`` times those of other images, image by image."""
    if not own.isfinite().all():
        return bool(other.isfinite().all())
    compared = paired(own.log() - math.log(margin), other.log())
    return compared.is_greater


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )
