"""Stage 3: the denoising networks."""

from __future__ import annotations

from ldm.denoiser.config import DenoiserConfig
from ldm.denoiser.controlnet import ControlNet, ControlNetConfig
from ldm.denoiser.mlp import MLP, MLPConfig
from ldm.denoiser.unet import LevelSpec, UNet, UNetConfig, UNetEncoder

__all__ = [
    "MLP",
    "ControlNet",
    "ControlNetConfig",
    "DenoiserConfig",
    "LevelSpec",
    "MLPConfig",
    "UNet",
    "UNetConfig",
    "UNetEncoder",
]
