"""The API of AUTOMATIC1111's web UI, as far as its usual clients call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from ldm.errors import SamplingError, unknown
from ldm.serving.controls import units_of
from ldm.serving.fields import settings_of
from ldm.serving.jobs import Job, Task
from ldm.serving.responses import base64_of, client_of, finished, in_base64, service_of
from ldm.serving.uploads import decoded_base64

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])

SAMPLERS = {
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM adaptive": "dpm_adaptive",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2_ancestral",
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DDIM": "ddim",
    "PLMS": "plms",
    "UniPC": "unipc",
    "LCM": "lcm",
}
"""Samplers of this package by the names of the web UI."""

SPACINGS = {
    "Automatic": None,
    "Uniform": "linspace",
    "Karras": "karras",
    "Exponential": "exponential",
    "SGM Uniform": "sgm_uniform",
    "Beta": "beta",
}
"""Spacings by the names of the web UI's schedulers; None: that of the model."""


class TextToImage(BaseModel):
    """A request of the web UI; further fields are accepted, without effect."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = Field("", examples=["a red apple"])
    negative_prompt: str = ""
    seed: int = Field(-1, description="-1: random.")
    sampler_name: str | None = Field(None, description="Default: the model's.", examples=["DPM++ 2M"])
    scheduler: str | None = Field(None, description="Default: the model's.", examples=["Karras"])
    steps: int | None = Field(None, description="Default: the model's.", examples=[20])
    cfg_scale: float | None = Field(None, description="Guidance scale; default: the model's.", examples=[5.0])
    width: int | None = None
    height: int | None = None
    batch_size: int = 1
    n_iter: int = 1
    eta: float | None = None
    alwayson_scripts: dict[str, Any] = Field(
        {},
        description="Units of the ControlNet extension: {'controlnet': {'args': [{'model': NAME, 'image': BASE64}]}}.",
    )


class ImageToImage(TextToImage):
    """A request of the web UI to change an image."""

    init_images: list[str] = Field(description="One image in base64.")
    mask: str | None = Field(None, description="Mask in base64, white where the image is repainted.")
    denoising_strength: float = 0.75


@router.post("/txt2img")
async def txt2img(body: TextToImage, request: Request) -> dict[str, Any]:
    """Generate images from a prompt."""

    def submit() -> Job:
        service, client = service_of(request), client_of(request)
        units = units_of(body.alwayson_scripts)
        work = service.controlled(client, units) if units else None
        return service.submit(client, None, _settings(body, body.width, body.height), work, previews=True)

    return await _result(submit, body, request)


@router.post("/img2img")
async def img2img(body: ImageToImage, request: Request) -> dict[str, Any]:
    """Change an image, or repaint it where the mask is white."""

    def submit() -> Job:
        service, client = service_of(request), client_of(request)
        if len(body.init_images) != 1:
            raise SamplingError(f"{len(body.init_images)} init_images are given; give one.")
        image, mask = (
            decoded_base64(body.init_images[0]),
            None if body.mask is None else decoded_base64(body.mask, "mask"),
        )
        size = None
        if body.width is not None and body.height is not None:
            size = body.width, body.height
        edit = service.edit(client, image, mask, size, strength=body.denoising_strength)
        units = units_of(body.alwayson_scripts)
        work = service.controlled(client, units, edit) if units else edit
        return service.submit(client, None, _settings(body), work, edit.size, previews=True)

    return await _result(submit, body, request)


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    """List the samplers."""
    return [{"name": name, "aliases": [own], "options": {}} for name, own in SAMPLERS.items()]


@router.get("/progress")
async def progress(request: Request) -> dict[str, Any]:
    """Return the progress of the client's current images, 0 to 1, with a preview."""
    tasks = _current(request)
    shares = [task.done / task.total if task.total else 0.0 for task in tasks]
    state = {
        "job": tasks[0].job.id if tasks else "",
        "job_count": len(tasks),
        "sampling_step": tasks[0].done if tasks else 0,
        "sampling_steps": (tasks[0].total or 0) if tasks else 0,
    }
    preview = next((task.preview for task in tasks if task.preview is not None), None)
    return {
        "progress": sum(shares) / len(shares) if shares else 0.0,
        "eta_relative": 0.0,
        "state": state,
        "current_image": None if preview is None else base64_of(preview),
    }


@router.post("/interrupt")
async def interrupt(request: Request) -> dict[str, Any]:
    """Cancel the client's jobs."""
    for job in {task.job for task in _current(request)}:
        service_of(request).scheduler.cancel(job)
    return {}


def _current(request: Request) -> list[Task]:
    jobs = service_of(request).scheduler.jobs_of(client_of(request))
    return [task for job in jobs for task in job.tasks]


def _settings(body: TextToImage, width: int | None = None, height: int | None = None) -> Any:
    """Return the settings that the fields of the web UI stand for."""
    sampler, spacing = body.sampler_name, body.scheduler
    if sampler is not None and sampler.endswith(" Karras"):  # as older versions have it
        sampler, spacing = sampler.removesuffix(" Karras"), "Karras"
    if sampler is not None and sampler not in SAMPLERS and sampler not in SAMPLERS.values():
        raise SamplingError(unknown("sampler", sampler, SAMPLERS))
    if spacing is not None and spacing not in SPACINGS:
        raise SamplingError(unknown("scheduler", spacing, SPACINGS))
    return settings_of(
        None,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or None,
        prompt_syntax="weighted",
        seed=None if body.seed == -1 else body.seed,
        sampler=None if sampler is None else SAMPLERS.get(sampler, sampler),
        spacing=None if spacing is None else SPACINGS[spacing],
        num_inference_steps=body.steps,
        guidance_scale=body.cfg_scale,
        width=width,
        height=height,
        num_images_per_prompt=body.batch_size * body.n_iter,
        eta=body.eta,
    )


async def _result(submit: Callable[[], Job], body: TextToImage, request: Request) -> dict[str, Any]:
    job = await finished(await run_in_threadpool(submit), request)
    info = {"seed": job.tasks[0].seed, "all_seeds": [task.seed for task in job.tasks], "prompt": body.prompt}
    return {
        "images": [await in_base64(request, task) for task in job.tasks],
        "parameters": body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"}),
        "info": json.dumps(info),
    }
