"""First stages: images to latents and back."""

from __future__ import annotations

from ldm.vae.autoencoder import AutoencoderKL, AutoencoderKLConfig
from ldm.vae.first_stage import FirstStage, FirstStageConfig, Identity, IdentityConfig
from ldm.vae.posterior import DiagonalGaussian, Posterior
from ldm.vae.tiling import Tiling
from ldm.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig
from ldm.vae.vq import VQ, VQConfig

__all__ = [
    "VQ",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DiagonalGaussian",
    "FirstStage",
    "FirstStageConfig",
    "Identity",
    "IdentityConfig",
    "Posterior",
    "Tiling",
    "TinyDecoder",
    "TinyDecoderConfig",
    "VQConfig",
]
