"""Latents and conditions of the examined samples, and the error of a denoiser on them by noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.samples import Batch, take
from ldm.diagnosis.check import Clock
from ldm.model import LatentDiffusion
from ldm.nn.conditioning import Conditioning
from ldm.training.tasks.task import on_device

CHUNK = 16
"""Samples that are computed at once."""

EXAMINED = 128
"""Largest number of samples whose errors are measured."""

LEVELS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Positions in the schedule, 0 to 1, of the noise levels at which errors are measured."""


@dataclass(frozen=True)
class Pool:
    """Samples, encoded once.

    Attributes:
        latents: normalized latents sampled from the posteriors, ``[n c h w]``.
        noise: unit noise of the same shape; the same in all measurements, so that they can be compared sample by sample.
        conditions: raw conditions by key, ``n`` entries each.
    """

    latents: Tensor
    noise: Tensor
    conditions: Batch

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, index: np.ndarray) -> Pool:
        """Return the samples ``index``."""
        rows = torch.from_numpy(index)
        return Pool(self.latents[rows], self.noise[rows], take(self.conditions, index))

    @property
    def variance(self) -> float:
        """Variance of the latents around the mean of each channel."""
        return float((self.latents - self.latents.mean((0, 2, 3), keepdim=True)).square().mean())

    def mismatched(self) -> tuple[Pool, np.ndarray]:
        """Return the pool with the conditions of other samples, and the samples whose conditions have thereby changed."""
        order = np.roll(np.arange(len(self)), len(self) // 2 or 1)
        other = take(self.conditions, order)
        changed = [
            i
            for i in range(len(self))
            if any(not _equal(own[i], other[key][i]) for key, own in self.conditions.items())
        ]
        return Pool(self.latents, self.noise, other), np.array(changed, dtype=np.int64)


def _equal(first: Any, second: Any) -> bool:
    return bool(torch.equal(first, second)) if isinstance(first, Tensor) else bool(first == second)


@torch.no_grad()
def make_pool(model: LatentDiffusion, images: Batch, device: torch.device) -> Pool:
    """Encode images with the first stage of a model."""
    generator = torch.Generator().manual_seed(0)
    shape = model.latent_shape(*images["image"].shape[2:])
    encoded = []
    for part in images["image"].split(CHUNK):
        unit = torch.randn((len(part), *shape), generator=generator)
        encoded.append(model.encode(part.to(device), unit.to(device)))
    latents = torch.cat(encoded)
    noise = torch.randn(latents.shape, generator=generator)
    defaults = model.config.conditioner.defaults(*model.config.size)
    batch = on_device({**{name: [pair] * len(latents) for name, pair in defaults.items()}, **images}, device)
    prepared = on_device(dict(model.conditioner.prepare_batch(batch, model.encode, generator)), torch.device("cpu"))
    keys = model.config.conditioner.input_keys
    return Pool(latents.cpu(), noise, {key: prepared[key] for key in keys if key in prepared})


def noise_levels(model: LatentDiffusion) -> Tensor:
    """Return the noise levels at :data:`LEVELS`, ``[l]`` fp32."""
    schedule = model.diffusion.schedule
    return schedule.sigma(torch.tensor(LEVELS, dtype=torch.float64) * (schedule.num_timesteps - 1)).float()


def conditioning(model: LatentDiffusion, part: Pool, dropout: torch.Generator | None = None) -> Conditioning:
    """Return the conditioning of some samples; conditions are dropped, as in training, only if a generator is given."""
    device = next(model.denoiser.parameters()).device
    conditions = on_device(part.conditions, device) or {"key": [""] * len(part)}
    record: Conditioning = model.conditioner(conditions, dropout)
    return record


@torch.no_grad()
def outputs(model: LatentDiffusion, pool: Pool, sigma: Tensor) -> Tensor:
    """Return the outputs of the network for noisy latents at levels ``sigma [n]``: ``[n c h w]``."""
    device = next(model.denoiser.parameters()).device
    parts = []
    for start in range(0, len(pool), CHUNK):
        part = pool.take(np.arange(start, min(start + CHUNK, len(pool))))
        level = sigma[start : start + len(part)].to(device)
        x = part.latents.to(device) + level[:, None, None, None] * part.noise.to(device)
        cond = model.with_estimate(x, level, conditioning(model, part))
        parts.append(model.diffusion.model_output(model.denoiser, x, level, cond).cpu())
    return torch.cat(parts)


@torch.no_grad()
def errors(model: LatentDiffusion, pool: Pool, clock: Clock) -> Tensor:
    """Return the error of the denoised latents of each sample at each of the noise levels: ``[k l]``, k samples.

    The unit is the error of the best denoiser that knows mean and variance of the latents, v s^2 / (v + s^2), so that 1 means
    that nothing was learned, and 0 perfect denoising; for the parametrization ``v`` and unit variance it is the training loss.
    Samples are measured in order for as long as the clock allows, at least one chunk.
    """
    levels, variance = noise_levels(model), pool.variance
    scale = variance * levels.square() / (variance + levels.square())
    rows: list[Tensor] = []
    for start in range(0, min(EXAMINED, len(pool)), CHUNK):
        if rows and clock.expired:
            break
        part = pool.take(np.arange(start, min(start + CHUNK, len(pool))))
        columns = [_error(model, part, level) for level in levels]
        rows.append(torch.stack(columns, dim=1) / scale)
    return torch.cat(rows)


def _error(model: LatentDiffusion, part: Pool, level: Tensor) -> Tensor:
    """Return the mean squared error of the denoised latents of each sample at one noise level, ``[n]``."""
    return (denoised(model, part, level) - part.latents).square().flatten(1).mean(1)


@torch.no_grad()
def denoised(model: LatentDiffusion, part: Pool, level: Tensor) -> Tensor:
    """Return the denoised latents of noisy true latents at one noise level, ``[n c h w]``."""
    device = next(model.denoiser.parameters()).device
    sigma = level.expand(len(part)).to(device)
    x = part.latents.to(device) + level.to(device) * part.noise.to(device)
    return model.denoise(x, sigma, model.with_estimate(x, sigma, conditioning(model, part))).cpu()
