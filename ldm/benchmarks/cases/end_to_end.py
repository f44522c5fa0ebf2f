"""Images from prompts with a model of the sizes of SD 1.5 and random weights, against diffusers and optimum-intel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.benchmarks.case import Setup, Work, peer_package, register
from ldm.benchmarks.cases.load import sd15_folder
from ldm.benchmarks.compare import Comparison
from ldm.pipeline import Pipeline

PROMPT, STEPS, GUIDANCE = "a photograph of a red apple on a table", 20, 7.5

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
}
"""Scheduler of diffusers by the name of our solver, with its arguments."""


@dataclass(frozen=True)
class Settings:
    """Settings of a generation; None = the default of each side.

    Attributes:
        dtype: True for the dtype of the run, False for the default of each side.
        sampler: name in :data:`SAMPLERS`.
        compile: backend of our side, if the run gives none.
        compile_peer: whether the other side is compiled too; None = as the run says.
        openvino_peer: whether the other side is optimum-intel's pipeline.
    """

    dtype: bool = True
    sampler: str | None = "ddim"
    compile: str | None = None
    compile_peer: bool | None = None
    openvino_peer: bool = False


def ours(setup: Setup, settings: Settings) -> Work:
    """Load the model into our pipeline."""
    dtype = setup.dtype if settings.dtype else None
    pipe = Pipeline.from_pretrained(str(sd15_folder(setup)), setup.device, dtype)
    backend = setup.compile or settings.compile
    if backend is not None:
        pipe.compile(backend)
    arguments: dict[str, Any] = _arguments(setup)
    if settings.sampler is not None:
        arguments["sampler"] = settings.sampler

    def run() -> Tensor:
        result: Tensor = pipe(PROMPT, seed=0, progress=False, output_type="pt", **arguments)
        return result

    return Work(run, compiled=backend is not None)


def theirs(setup: Setup, ours: Work, settings: Settings) -> Work:
    """Load the same folder into the other library's pipeline."""
    from diffusers import StableDiffusionPipeline

    dtype = {"torch_dtype": setup.dtype} if settings.dtype else {}
    if settings.openvino_peer:
        kind = peer_package("optimum.intel").OVStableDiffusionPipeline
        pipe: Any = kind.from_pretrained(sd15_folder(setup), export=True)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(sd15_folder(setup), **dtype).to(setup.device)
        if setup.compile_peer if settings.compile_peer is None else settings.compile_peer:
            if setup.device.type == "cuda":
                pipe.unet.to(memory_format=torch.channels_last)
                pipe.vae.to(memory_format=torch.channels_last)
            pipe.unet.compile()
            pipe.vae.decoder.compile()
    if settings.sampler is not None:
        pipe.scheduler = _scheduler(pipe, settings.sampler)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor | None:
        generator = torch.Generator().manual_seed(0)
        images = pipe(PROMPT, generator=generator, output_type=output_type, **_arguments(setup)).images
        return images if settings.sampler is not None and isinstance(images, Tensor) else None

    output_type = "np" if settings.openvino_peer else "pt"
    return Work(run, compiled=bool(settings.compile_peer or settings.openvino_peer))


def _arguments(setup: Setup) -> dict[str, Any]:
    side = 64 if setup.small else 512
    return {
        "num_inference_steps": setup.steps or (2 if setup.small else STEPS),
        "guidance_scale": GUIDANCE,
        "height": side,
        "width": side,
        "num_images_per_prompt": setup.batch_size or 1,
    }


def _scheduler(pipe: Any, sampler: str) -> Any:
    import diffusers

    name, options = SAMPLERS[sampler]
    return getattr(diffusers, name).from_config(pipe.scheduler.config, **options)


for _name, _title, _peer, _settings, _packages in (
    (
        "end-to-end-defaults",
        "an image, each side at its defaults",
        "diffusers",
        Settings(dtype=False, sampler=None),
        (),
    ),
    ("end-to-end-equal", "an image at equal dtype and sampler", "diffusers", Settings(), ()),
    (
        "end-to-end-inductor",
        "the same, both compiled by inductor",
        "diffusers compiled",
        Settings(compile="inductor", compile_peer=True),
        (),
    ),
    (
        "end-to-end-openvino",
        "the same, both by OpenVINO",
        "optimum-intel",
        Settings(compile="openvino", openvino_peer=True),
        ("optimum.intel",),
    ),
):
    register(
        Comparison(
            _name,
            _title,
            _peer,
            partial(ours, settings=_settings),
            partial(theirs, settings=_settings),
            ("diffusers", *_packages),
        )
    )
