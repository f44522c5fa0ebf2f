"""Stage 1: images to latents and back."""

from __future__ import annotations

from ldm.vae import autoencoder_formats as autoencoder_formats
from ldm.vae.autoencoder import AutoencoderKL, AutoencoderKLConfig
from ldm.vae.first_stage import DiagonalGaussian, FirstStage, FirstStageConfig, Identity, IdentityConfig
from ldm.vae.tiling import Tiling

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DiagonalGaussian",
    "FirstStage",
    "FirstStageConfig",
    "Identity",
    "IdentityConfig",
    "Tiling",
]
