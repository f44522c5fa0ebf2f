"""Training steps of the emoji VAE, against diffusers' ``AutoencoderKL`` with the same losses."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.benchmarks.case import Setup, Work, register
from ldm.benchmarks.cases.train_denoiser import EMOJI
from ldm.benchmarks.compare import Comparison
from ldm.benchmarks.models import diffusers_vae
from ldm.benchmarks.training import OurTraining, TheirTraining, ema_of
from ldm.training.experiment import load_config
from ldm.training.tasks import VAETask


def ours(setup: Setup, adversarial: bool) -> Work:
    """Build the task with its training step; with the discriminator, as it is after ``disc_start``."""
    experiment = load_config(EMOJI)
    stage: Any = experiment.vae
    if not adversarial:
        stage = replace(stage, loss=replace(stage.loss, adversarial=0.0))
    if setup.small:
        model = replace(stage.model, widths=(16, 16, 16, 16))
        stage = replace(stage, model=model, train=replace(stage.train, batch_size=2))
    torch.manual_seed(0)
    task = VAETask(stage).to(setup.device).train()
    batch = {"image": _images(task, setup)}
    return OurTraining(task, stage.train, batch, setup, stage.train.max_steps - 1).work(task.first_stage)


def theirs(setup: Setup, ours: Work) -> Work:
    """Build the same step with diffusers' autoencoder, with copies of our weights."""
    task: Any = ours.task
    config, train, image = task.config.loss, task.config.train, _images(task, setup)
    vae = diffusers_vae(task.first_stage, copied=True).requires_grad_(True).train()
    discriminator = copy.deepcopy(task.discriminator)
    if discriminator is not None:
        discriminator.requires_grad_(True)
    last_layer = vae.decoder.conv_out.weight
    rebuilt: list[Tensor] = []

    def loss() -> Tensor:
        posterior = vae.encode(image).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        rebuilt[:] = [reconstruction.detach()]
        error = reconstruction.float() - image
        rec_loss = (config.l1 * error.abs() + config.l2 * error.square()).flatten(1).sum(1).mean()
        total = rec_loss + config.kl * posterior.kl().mean()
        if discriminator is not None:
            discriminator.requires_grad_(False)
            g_loss = -discriminator(reconstruction).mean()
            rec_grad, g_grad = (
                torch.autograd.grad(each, last_layer, retain_graph=True)[0] for each in (rec_loss, g_loss)
            )
            weight = (rec_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0, 1e4).detach()
            total = total + config.adversarial * weight * g_loss
            discriminator.requires_grad_(True)
        return total / image[0].numel()

    def discriminator_loss() -> Tensor:
        assert discriminator is not None
        real, fake = discriminator(image), discriminator(rebuilt[0])
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    losses, modules = [loss], [vae]
    if discriminator is not None:
        losses, modules = [loss, discriminator_loss], [vae, discriminator]
    return TheirTraining(losses, modules, train, setup, ema_of(vae, train)).work(vae)


def _images(task: VAETask, setup: Setup) -> Tensor:
    assert task.config.train is not None
    images = setup.randn(setup.batch_size or task.config.train.batch_size, 3, 64, 64).float()
    return images.clamp(-1, 1).contiguous()


for _name, _title, _adversarial in (
    ("train-vae", "training step of the emoji VAE without a discriminator", False),
    ("train-vae-gan", "training step of the emoji VAE with its discriminator", True),
):
    register(Comparison(_name, _title, "diffusers", partial(ours, adversarial=_adversarial), theirs))
