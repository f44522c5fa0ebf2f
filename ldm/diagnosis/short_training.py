"""Trainings of a few steps on copies of the denoiser, from new or from the current weights, as experiments."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ldm.diagnosis.check import Clock
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.pool import Pool, conditioning
from ldm.model import LatentDiffusion
from ldm.training.config import TrainConfig
from ldm.training.gradient_clipping import clip_gradients

BATCH = 16
"""Largest number of samples of a step."""


def current(run: OpenedRun) -> LatentDiffusion:
    """Return a copy of the model with the weights that training would continue from, ready to be trained."""
    return _trainable(run, run.model(averaged=False))


def restarted(run: OpenedRun) -> LatentDiffusion:
    """Return a copy of the model with a new denoiser; parts that stage 3 does not train keep their weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LatentDiffusion(run.config, run.stages["denoiser"].header.tokenizer)
    new = {name for name in trained_names(model) if not _pretrained(model, name)}
    state = run.averaged.state_dict()
    model.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name in new}
        | {name: tensor.clone() for name, tensor in state.items() if name not in new}
    )
    return _trainable(run, model.to(run.device))


def trained_names(model: LatentDiffusion) -> set[str]:
    """Return the names of the parameters that stage 3 trains, of a model that was just built."""
    return {
        name for name, each in model.named_parameters() if each.requires_grad and not name.startswith("first_stage.")
    }


def _pretrained(model: LatentDiffusion, name: str) -> bool:
    encoders = {module for _, module in model.conditioner.pretrained_encoders()}
    prefixes = [f"conditioner.{path}." for path, module in model.conditioner.named_modules() if module in encoders]
    return name.startswith(tuple(prefixes))


def _trainable(run: OpenedRun, model: LatentDiffusion) -> LatentDiffusion:
    """Enable the gradients of the parameters that stage 3 trains."""
    names = trained_names(LatentDiffusion(run.config, run.stages["denoiser"].header.tokenizer))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model.train()


def train(
    run: OpenedRun,
    model: LatentDiffusion,
    config: TrainConfig,
    pool: Pool,
    steps: int,
    clock: Clock,
    *,
    same_batch: bool = False,
) -> Tensor:
    """Train a copy, and return the loss of each sample of each step, ``[steps b]``.

    It is trained as by stage 3, but in fp32, without warm-up, decay and self-conditioning, and without terms of the loss that
    read hidden states.

    Args:
        run: the run, for the loss.
        model: the copy, changed in place; it is in evaluation mode afterwards.
        config: hyperparameters.
        pool: samples to draw batches from.
        steps: number of steps; fewer if the clock expires.
        clock: time that the training may take.
        same_batch: train on the first samples, always with the same noise, at noise levels spread over the schedule.
    """
    loss_of, generator = run.experiment.denoiser.loss.build(), torch.Generator().manual_seed(0)
    device, schedule = run.device, model.diffusion.schedule
    optimizer, size, losses = config.optimizer.build([model, loss_of.to(device)], config), min(BATCH, len(pool)), []
    rows = np.random.default_rng(0)
    spread = schedule.sigma((torch.arange(size) + 0.5) / size * (schedule.num_timesteps - 1)).float()
    for step in range(steps):
        if step >= 2 and clock.expired:
            break
        part = pool.take(np.arange(size) if same_batch else rows.permutation(len(pool))[:size])
        fixed = {"sigma": spread.to(device), "noise": part.noise.to(device)} if same_batch else {}
        dropout = None if same_batch else generator
        cond = conditioning(model, part, dropout)
        loss, _ = loss_of(model.denoiser, model.diffusion, part.latents.to(device), cond, generator, **fixed)
        losses.append(loss.detach().cpu())
        loss.mean().backward()
        if config.gradient_clip is not None:
            clip_gradients((p for group in optimizer.param_groups for p in group["params"]), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return torch.stack(losses)


def falls(losses: Tensor) -> float:
    """Return by how many standard errors, over the samples, the loss of one batch has fallen at the end of a training."""
    first, last = losses[0].double(), losses[-max(1, len(losses) // 5) :].double().mean(0)
    if not last.isfinite().all():
        return -math.inf
    # The logarithm: the losses of different noise levels differ by orders of magnitude.
    change = (first / last.clamp(min=1e-12)).log()
    return float(change.mean() / (change.std() / math.sqrt(len(change))).clamp(min=1e-12))
