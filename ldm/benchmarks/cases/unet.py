"""Forward pass of U-Nets, against diffusers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ldm.benchmarks.case import Setup, Work, register
from ldm.benchmarks.compare import Comparison, inference
from ldm.benchmarks.models import diffusers_unet, pipeline, sd15, sd15_unet, sdxl_unet
from ldm.nn.conditioning import Conditioning


class Inputs:
    """Noisy latents, timesteps and conditions of a forward pass, the same for both sides."""

    def __init__(self, unet: Any, setup: Setup, batch: int, side: int):
        config, batch = unet.config, setup.batch_size or batch
        side = 16 if setup.small else side
        self.x = setup.randn(batch, config.in_channels, side, side)
        self.t = torch.full((batch,), 500, device=setup.device)
        self.context = setup.randn(batch, 77, config.context_width, seed=1)
        self.vector = None if config.vector_width is None else setup.randn(batch, config.vector_width, seed=2)


def ours(setup: Setup, sdxl: bool) -> Work:
    """Build our U-Net in a pipeline."""
    unet_config = sdxl_unet(setup.small) if sdxl else sd15_unet(setup.small)
    unet = pipeline(sd15(setup, whole=False, denoiser=unet_config), setup).model.denoiser
    inputs = Inputs(unet, setup, *((1, 128) if sdxl else (2, 64)))
    cond = Conditioning(context=inputs.context, vector=inputs.vector)
    return Work(inference(lambda: unet(inputs.x, inputs.t, cond)), unet)


def theirs(setup: Setup, ours: Work, sdxl: bool) -> Work:
    """Build diffusers' U-Net."""
    unet = diffusers_unet(ours.network)
    inputs = Inputs(ours.network, setup, *((1, 128) if sdxl else (2, 64)))
    if setup.compile_peer:
        unet.compile()
    options = {} if inputs.vector is None else {"class_labels": inputs.vector}
    return Work(inference(lambda: unet(inputs.x, inputs.t, inputs.context, **options).sample), unet)


for _name, _title, _sdxl in (
    ("unet-sd15", "U-Net of SD 1.5, 2 latents of 64 x 64", False),
    ("unet-sdxl", "U-Net of SDXL, 1 latent of 128 x 128", True),
):
    register(Comparison(_name, _title, "diffusers", ours=partial(ours, sdxl=_sdxl), theirs=partial(theirs, sdxl=_sdxl)))
