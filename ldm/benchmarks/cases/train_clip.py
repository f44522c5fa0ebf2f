"""Training steps of the emoji CLIP, against open_clip's model, loss and loop."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.benchmarks.case import Setup, Work, register
from ldm.benchmarks.cases.train_denoiser import EMOJI
from ldm.benchmarks.compare import Comparison
from ldm.benchmarks.models import peer_of
from ldm.benchmarks.training import OurTraining, TheirTraining
from ldm.clip.tokenizer import train_byte_bpe
from ldm.training.experiment import load_config
from ldm.training.tasks import CLIPTask

SHORT, LONG = "a red apple {}", "woman scientist with a medium skin tone and a red apple number {}, and much more text"
"""Captions about as long as those of the emoji set, and captions that fill the context."""


def ours(setup: Setup, caption: str) -> Work:
    """Build the task with its training step, without EMA, which open_clip's loop does not have."""
    experiment = load_config(EMOJI)
    stage: Any = experiment.clip
    stage = replace(stage, train=replace(stage.train, ema_decay=0.0))
    if setup.small:
        tower = {"width": 64, "layers": 1, "heads": 2}
        text, image = (replace(each, **tower) for each in (stage.model.text, stage.model.image))
        model = replace(stage.model, text=text, image=image, embed_dim=32)
        stage = replace(stage, model=model, train=replace(stage.train, batch_size=4))
    torch.manual_seed(0)
    words = stage.tokenizer
    task = CLIPTask(stage, train_byte_bpe([""], words.vocab_size, words.context_length)).to(setup.device).train()
    images, captions = _batch(task, setup, caption)
    batch = {"key": captions, "text": captions, "image": images}
    return OurTraining(task, stage.train, batch, setup, 1).work(task.clip)


def theirs(setup: Setup, ours: Work, caption: str) -> Work:
    """Build open_clip's step with copies of our weights; its captions are tokenized beforehand, at the full length."""
    import open_clip
    from open_clip.loss import ClipLoss

    from ldm.clip.model_formats import CLIPOpenCLIP

    task: Any = ours.task
    images, captions = _batch(task, setup, caption)
    tokens = task.tokenizer(captions).to(setup.device)
    clip = peer_of(
        task.clip,
        CLIPOpenCLIP(),
        lambda values: open_clip.CLIP(**values["model_cfg"], output_dict=True),
        copied=True,
    )
    clip.requires_grad_(True).train()
    criterion = ClipLoss()

    def loss() -> Tensor:
        return criterion(**clip(images, tokens))

    def clamp() -> None:
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))

    return TheirTraining([loss], [clip], task.config.train, setup, clamp).work(clip)


def _batch(task: CLIPTask, setup: Setup, caption: str) -> tuple[Tensor, list[str]]:
    assert task.config.train is not None
    assert task.config.model.image is not None
    n, side = setup.batch_size or task.config.train.batch_size, task.config.model.image.image_size
    images = setup.randn(n, 3, side, side).float().clamp(-1, 1).contiguous()
    return images, [caption.format(i) for i in range(n)]


for _name, _title, _caption in (
    ("train-clip", "training step of the emoji CLIP, captions that fill the context", LONG),
    ("train-clip-short", "the same with captions of usual length", SHORT),
):
    register(
        Comparison(
            _name,
            _title,
            "open_clip",
            partial(ours, caption=_caption),
            partial(theirs, caption=_caption),
            ("open_clip",),
        )
    )
