"""Decoder and encoder of the autoencoder of SD 1.5, against diffusers, and the tiny decoder of the shipped model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.benchmarks.case import Setup, Work, register
from ldm.benchmarks.compare import Comparison, inference
from ldm.benchmarks.models import diffusers_vae, pipeline, sd15, sd_vae
from ldm.model import LatentDiffusion
from ldm.pipeline import Pipeline
from ldm.vae import FirstStage


def _stage(setup: Setup) -> tuple[FirstStage, FirstStage]:
    """Build our first stage in a pipeline; return it, and what is called in its place: compiled if the run is."""
    model = pipeline(sd15(setup, whole=False, first_stage=sd_vae(setup.small)), setup).model
    stage = model.first_stage
    return stage, stage if model.accelerator is None else model.accelerator.first_stage(stage)


def _image(setup: Setup) -> Tensor:
    side = 64 if setup.small else 512
    return setup.randn(setup.batch_size or 1, 3, side, side)


def _latent(setup: Setup) -> Tensor:
    side = 8 if setup.small else 64
    return setup.randn(setup.batch_size or 1, 4, side, side)


def decoder(setup: Setup) -> Work:
    """Build our decoder."""
    stage, called = _stage(setup)
    z = _latent(setup)
    return Work(inference(lambda: called.decode(z)), stage)


def their_decoder(setup: Setup, ours: Work) -> Work:
    """Build diffusers' decoder."""
    vae, z = diffusers_vae(ours.network), _latent(setup)
    if setup.compile_peer:
        vae.decoder.compile()
    return Work(inference(lambda: vae.decode(z).sample), vae)


def encoder(setup: Setup) -> Work:
    """Build our encoder."""
    stage, called = _stage(setup)
    image = _image(setup)
    return Work(inference(lambda: called.encode(image).mode), stage)


def their_encoder(setup: Setup, ours: Work) -> Work:
    """Build diffusers' encoder."""
    vae, image = diffusers_vae(ours.network), _image(setup)
    if setup.compile_peer:
        vae.encoder.compile()
    return Work(inference(lambda: vae.encode(image)[0].mode()), vae)  # noqa: PLW0108


def tiny_decoder(setup: Setup) -> Work:
    """Load the tiny decoder of the shipped model."""
    model = _shipped(setup)
    assert model.tiny_decoder is not None
    return _decoding(model.tiny_decoder.decode, model, setup)


def full_decoder(setup: Setup, ours: Work) -> Work:
    """Load the decoder that it stands for."""
    model = _shipped(setup)
    stage = model.first_stage
    return _decoding(lambda z: stage.decode(stage.denormalize(z).to(z)), model, setup)


def _shipped(setup: Setup) -> LatentDiffusion:
    return Pipeline.from_pretrained("emoji", setup.device, setup.dtype).model


def _decoding(decode: Callable[[Tensor], Tensor], model: LatentDiffusion, setup: Setup) -> Work:
    """Decode random latents, for which the outputs of two decoders need not be alike, so that they are not returned."""
    stage = model.first_stage
    z = setup.randn(setup.batch_size or 1, stage.latent_channels, *(side // stage.factor for side in model.config.size))

    @torch.inference_mode()
    def run() -> None:
        decode(z)

    return Work(run)


register(Comparison("vae-decode", "decoder of SD 1.5, 512 x 512 pixels", "diffusers", decoder, their_decoder))
register(Comparison("vae-tiny", "tiny decoder of the shipped model", "its decoder", tiny_decoder, full_decoder))
register(Comparison("vae-encode", "encoder of SD 1.5, 512 x 512 pixels", "diffusers", encoder, their_encoder))
