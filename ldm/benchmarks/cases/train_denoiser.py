"""Training steps of U-Nets on cached latents, against the step of diffusers' ``train_text_to_image.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.benchmarks.case import Setup, Work, register
from ldm.benchmarks.compare import Comparison
from ldm.benchmarks.models import diffusers_unet, require_memory, sd15, sd15_text, sd15_unet, transformers_text
from ldm.benchmarks.training import BACKWARD, OurTraining, TheirTraining, ema_of
from ldm.clip.tokenizer import train_byte_bpe
from ldm.diffusion import Diffusion
from ldm.model import LatentDiffusion
from ldm.nn.gradient_checkpointing import set_gradient_checkpointing
from ldm.training.config import TrainConfig
from ldm.training.experiment import load_config
from ldm.training.tasks import DenoiserTask
from ldm.training.tasks.denoiser import DenoiserStage

EMOJI = "configs/emoji_64.yaml"

BILLIONS, STATES = 0.86, 5
"""Parameters of the U-Net of SD 1.5, and tensors of this size in a training: weights, gradients, moments of Adam and average."""


def emoji_task(setup: Setup) -> DenoiserTask:
    """Build the task of the emoji U-Net, with a text encoder of random weights."""
    plain = ["denoiser.loss=weighted", "denoiser.diffusion={schedule: cosine, parametrization: v}"]  # as the peer
    small = ["denoiser.model.levels=[{width: 32}, {width: 64, depth: 1}]", "denoiser.train.batch_size=2"]
    experiment = load_config(EMOJI, [*plain, *(small if setup.small else [])])
    assert experiment.clip is not None
    words = experiment.clip.tokenizer
    tokenizer = train_byte_bpe([""], words.vocab_size, words.context_length)
    return _trained(DenoiserTask(experiment.denoiser, LatentDiffusion(experiment.model_config, tokenizer)), setup)


def sd15_task(
    setup: Setup, checkpointing: bool = True, batch_size: int = 1, states: int = 2 * STATES, ema_decay: float = 0.9999
) -> DenoiserTask:
    """Build the task of a U-Net of SD 1.5 with the text encoder of SD 1.5; the first stage is tiny, since it is not used.

    Args:
        setup: of the run.
        checkpointing: whether gradient checkpointing is used.
        batch_size: of a step.
        states: tensors of the size of the U-Net's weights that both sides need in all.
        ema_decay: decay of the averaged weights; 0 = there are none.
    """
    require_memory(0 if setup.small else int(states * BILLIONS * 4e9), setup)
    unet, train = sd15_unet(setup.small), TrainConfig(1000, setup.batch_size or batch_size, 1e-5)
    model = sd15(in_fp32(setup), whole=False, denoiser=unet, tower=sd15_text(setup.small))
    stage = DenoiserStage(
        model=model.config.denoiser,
        conditioner=model.config.conditioner,
        train=replace(train, gradient_checkpointing=checkpointing, ema_decay=ema_decay),
        diffusion=Diffusion(),
    )
    return _trained(DenoiserTask(stage, model), setup)


def in_fp32(setup: Setup) -> Setup:
    """Return the setup with weights in fp32, which a training under autocast has."""
    return replace(setup, dtype=torch.float32)


def _trained(task: DenoiserTask, setup: Setup) -> DenoiserTask:
    task.to(setup.device).train()
    task.model.denoiser.requires_grad_(True)
    for parameter in task.model.denoiser.parameters():  # the last layers of a new U-Net are zero
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator(setup.device).manual_seed(1))
    task.model.conditioner.requires_grad_(False)
    set_gradient_checkpointing(task.model.denoiser, task.config.train.gradient_checkpointing)
    return task


class Batch:
    """Cached posteriors of latents and captions, the same for both sides."""

    def __init__(self, task: DenoiserTask, setup: Setup):
        n = setup.batch_size or task.config.train.batch_size
        channels, height, width = task.model.latent_shape()
        self.captions = [f"a red apple on a blue table, number {i}" for i in range(n)]
        mean = setup.randn(n, channels, height, width).float()
        self.posterior = {"mean": mean, "std": torch.full_like(mean, 0.1)}
        self.ours = {"key": [str(i) for i in range(n)], "text": self.captions, **self.posterior}


def ours(setup: Setup, build: Callable[[Setup], DenoiserTask]) -> Work:
    """Build the task with its training step."""
    task = build(setup)
    return OurTraining(task, task.config.train, Batch(task, setup).ours, setup).work(task.model.denoiser)


def theirs(setup: Setup, ours: Work, copied: bool = True) -> Work:
    """Build the step of diffusers' script with copies of our weights; if they are not trained, they can be shared."""
    task: Any = ours.task
    model, train, batch = task.model, task.config.train, Batch(task, setup)
    unet = diffusers_unet(model.denoiser, copied).requires_grad_(True).train()
    if train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if setup.compile_peer:
        unet.compile()
    conditioner: Any = model.conditioner
    text = copy.deepcopy(transformers_text(conditioner.tower)).to(setup.dtype)
    pooled = task.config.model.vector_width is not None
    first_stage, schedule = model.first_stage, model.diffusion.schedule
    sigmas, v = schedule.table.to(setup.device, torch.float32), model.diffusion.parametrization.kind == "v"

    def loss() -> Tensor:
        latents = first_stage.normalize(batch.posterior["mean"] + batch.posterior["std"] * _noise(batch))
        tokens = conditioner.tokenizer(batch.captions).to(setup.device)
        with torch.no_grad():
            states = text(tokens)
        noise = _noise(batch)
        timesteps = torch.randint(len(sigmas), (len(latents),)).to(setup.device)
        alpha = (1 + sigmas[timesteps].square()).rsqrt()[:, None, None, None]
        sigma = (1 - alpha.square()).sqrt()
        noisy, target = alpha * latents + sigma * noise, alpha * noise - sigma * latents if v else noise
        options = {"class_labels": states[0]} if pooled else {}
        output = unet(noisy, timesteps, states.last_hidden_state, return_dict=False, **options)[0]
        return F.mse_loss(output.float(), target.float())

    training = TheirTraining([loss], [unet], train, setup, ema_of(unet, train))
    return training.work(unet)


def _noise(batch: Batch) -> Tensor:
    return torch.randn_like(batch.posterior["mean"])


def our_gradients(setup: Setup) -> Work:
    """Build the forward and backward pass of a U-Net of SD 1.5, which needs no optimizer's memory."""
    task = sd15_task(setup, states=3, ema_decay=0.0)
    training = OurTraining(task, task.config.train, Batch(task, setup).ours, setup)
    return Work(training.gradients, task.model.denoiser, task=task)


def their_gradients(setup: Setup, ours: Work) -> Work:
    """Build the same with diffusers' U-Net."""
    work = theirs(setup, ours, copied=False)
    return work._replace(run=work.parts[BACKWARD], parts={})


for _name, _title, _build in (
    ("train-emoji", "training step of the emoji U-Net", emoji_task),
    ("train-sd15", "training step of the U-Net of SD 1.5, gradient checkpointing", sd15_task),
    (
        "train-sd15-cached",
        "training step of the U-Net of SD 1.5, batch 16 of cached latents",
        partial(sd15_task, checkpointing=False, batch_size=16),
    ),
):
    register(Comparison(_name, _title, "diffusers", partial(ours, build=_build), theirs, ("diffusers", "transformers")))
register(
    Comparison(
        "train-sd15-backward",
        "forward and backward of the U-Net of SD 1.5, gradient checkpointing",
        "diffusers",
        our_gradients,
        their_gradients,
        ("diffusers", "transformers"),
    )
)
