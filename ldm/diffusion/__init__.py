"""The mathematics of diffusion: noise schedules, parametrizations, the training loss, guidance and samplers."""

from __future__ import annotations

from ldm.diffusion.contrastive import ContrastiveFlowLossConfig
from ldm.diffusion.dispersive import DispersiveLossConfig
from ldm.diffusion.guidance import Composition, Guidance, Perturbable, Projection, guided
from ldm.diffusion.loss import DenoisingLossConfig, WeightedLossConfig
from ldm.diffusion.noise_level_samplers import NoiseLevelSampler
from ldm.diffusion.parametrization import Diffusion, Parametrization
from ldm.diffusion.samplers import (
    OPTIONS,
    SAMPLERS,
    SPECS,
    Denoiser,
    Noise,
    SamplerSpec,
    Step,
    brownian_noise,
    seeded_noise,
)
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.spacing import (
    SPACINGS,
    sigmas,
    sigmas_from_timesteps,
    sigmas_from_values,
    timesteps,
)
from ldm.diffusion.uncertainty import UncertaintyLossConfig

__all__ = [
    "OPTIONS",
    "SAMPLERS",
    "SPACINGS",
    "SPECS",
    "Composition",
    "ContrastiveFlowLossConfig",
    "Denoiser",
    "DenoisingLossConfig",
    "Diffusion",
    "DispersiveLossConfig",
    "Guidance",
    "Noise",
    "NoiseLevelSampler",
    "Parametrization",
    "Perturbable",
    "Projection",
    "SamplerSpec",
    "Schedule",
    "Step",
    "UncertaintyLossConfig",
    "WeightedLossConfig",
    "brownian_noise",
    "guided",
    "seeded_noise",
    "sigmas",
    "sigmas_from_timesteps",
    "sigmas_from_values",
    "timesteps",
]
