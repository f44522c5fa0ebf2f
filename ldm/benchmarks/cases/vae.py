"""Decoder and encoder of the autoencoder of SD 1.5 for 512 x 512 pixels, against diffusers."""

from __future__ import annotations

from ldm.benchmarks.case import Setup, Work, register
from ldm.benchmarks.compare import Comparison, inference
from ldm.benchmarks.models import diffusers_vae, pipeline, sd15, sd_vae


def _side(setup: Setup) -> int:
    return 64 if setup.small else 512


def decoder(setup: Setup) -> Work:
    """Build our decoder in a pipeline."""
    model = pipeline(sd15(setup, whole=False, first_stage=sd_vae(setup.small)), setup).model
    z = setup.randn(setup.batch_size or 1, 4, _side(setup) // 8, _side(setup) // 8)
    return Work(inference(lambda: model.tiling.decode(model.first_stage, z)), model.first_stage)


def their_decoder(setup: Setup, ours: Work) -> Work:
    """Build diffusers' decoder."""
    vae = diffusers_vae(ours.network)
    z = setup.randn(setup.batch_size or 1, 4, _side(setup) // 8, _side(setup) // 8)
    if setup.compile_peer:
        vae.decoder.compile()
    return Work(inference(lambda: vae.decode(z).sample), vae)


def encoder(setup: Setup) -> Work:
    """Build our encoder in a pipeline."""
    model = pipeline(sd15(setup, whole=False, first_stage=sd_vae(setup.small)), setup).model
    image = setup.randn(setup.batch_size or 1, 3, _side(setup), _side(setup))
    return Work(inference(lambda: model.tiling.encode(model.first_stage, image).mode), model.first_stage)


def their_encoder(setup: Setup, ours: Work) -> Work:
    """Build diffusers' encoder."""
    vae = diffusers_vae(ours.network)
    image = setup.randn(setup.batch_size or 1, 3, _side(setup), _side(setup))
    if setup.compile_peer:
        vae.encoder.compile()
    return Work(inference(lambda: vae.encode(image)[0].mode()), vae)  # noqa: PLW0108


register(Comparison("vae-decode", "decoder of SD 1.5, 512 x 512 pixels", "diffusers", decoder, their_decoder))
register(Comparison("vae-encode", "encoder of SD 1.5, 512 x 512 pixels", "diffusers", encoder, their_encoder))
