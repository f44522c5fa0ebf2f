"""Training steps of a denoiser on stored latents, or latents and text states, against encoding them in every step."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.benchmarks.case import Case, Setup, register
from ldm.benchmarks.compare import alternate
from ldm.benchmarks.peaks import Peaks
from ldm.benchmarks.result import Result, Side
from ldm.clip.tokenizer import train_byte_bpe
from ldm.data.encoded_source import EncodedSource
from ldm.data.samples import BatchIndices, Samples
from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.training.experiment import load_config
from ldm.training.tasks import DenoiserTask
from ldm.training.tasks.task import Step, on_device

EXPERIMENT = "configs/emoji_64.yaml"
SMALL = (
    "denoiser.model.levels=[{width: 32}, {width: 32, depth: 1}]",
    "denoiser.train.batch_size=4",
    "vae.model.widths=[16, 16, 16, 16]",
)
"""Changes of the config for a small run."""

BATCHES = 8
"""Batches of different samples that are used in turn."""


@dataclass(frozen=True)
class StoredEncodings(Case):
    """A step reads a batch, computes loss and gradients, and updates the weights.

    The losses of both sides are compared in fp32. First stage and text encoder have random weights, which makes no difference to
    the time.

    Attributes:
        text: dtype in which text states are stored too; None = only latents are.
    """

    name: str
    title: str
    text: str | None
    peer: str = "ldm, encoding live"

    def measure(self, setup: Setup, peaks: Peaks | None) -> Result:
        torch.manual_seed(0)
        changes = SMALL if setup.small else ()
        plain = ["data.cache_latents=false", "data.captions.templates=[]", "denoiser.loss=weighted"]
        experiment = load_config(setup.options.get("experiment", EXPERIMENT), [*plain, *changes])
        if experiment.clip is None:
            raise LdmError("the case latents needs an experiment with a clip section; give another --experiment.")
        words = experiment.clip.tokenizer
        model = LatentDiffusion(experiment.model_config, train_byte_bpe([""], words.vocab_size, words.context_length))
        task, size = DenoiserTask(experiment.denoiser, model.to(setup.device)), experiment.denoiser.train.batch_size
        data: Any = experiment.data
        with tempfile.TemporaryDirectory() as folder:
            data = replace(data, encoded=replace(data.encoded, folder=folder, text=self.text))
            source = EncodedSource(data, model.first_stage, "none", model.conditioner)
            live = _Steps(task, source, data.open("train"), size, setup.dtype)
            stored = _Steps(task, source, _encoded(source, BATCHES * size), size, setup.dtype)
            losses = [float(each.loss(0, torch.float32).detach()) for each in (stored, live)]
            ours, theirs = alternate(stored.train, live.train, setup)
        difference = abs(losses[0] / losses[1] - 1)
        return Result(self.name, self.title, self.peer, Side(ours), Side(theirs), difference)


class _Steps:
    """Training steps of a denoiser on one set of samples."""

    def __init__(self, task: DenoiserTask, source: EncodedSource, samples: Samples, size: int, dtype: torch.dtype):
        self.task, self.source, self.samples, self.size, self.number = task, source, samples, size, 0
        self.dtype, self.device = dtype, next(task.parameters()).device
        train = task.config.train
        self.optimizer = train.optimizer.build([task], train)

    def loss(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return the loss of a batch in a precision, with noise that its number determines."""
        index = number % BATCHES * self.size + np.arange(self.size)
        batch = self.source.complete(on_device(self.samples[BatchIndices(index)], self.device), self.device)
        generator = torch.Generator().manual_seed(number)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return next(iter(self.task.losses(batch, Step(number, 0, generator)))).value

    def train(self) -> None:
        """Make the next step."""
        self.loss(self.number, self.dtype).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1


def _encoded(source: EncodedSource, samples: int) -> Samples:
    """Encode the first training samples, and open them."""
    from ldm.data.encoded_shards import EncodedShards, encode_shards, write_empty
    from ldm.data.encoding import Encoder, local_engine
    from ldm.data.storage import joined

    images, config = source.images("train"), source.data.encoded
    encoding, crops = source.encoding("train", images), source.crops("train")
    conditioner = source.conditioner if "text" in encoding else None
    device = next(source.first_stage.parameters()).device
    encoder = Encoder(source.first_stage, conditioner, config, flips=source.flips("train"), device=device)
    shards = EncodedShards(joined(source.folder, "train"), encoding, config, [samples])
    encode_shards(shards, range(len(shards)), local_engine(images, encoder, crops), int)
    if conditioner is not None:
        write_empty(source.folder, encoder)
    shards.finish()
    return source.open("train", images, device)


register(StoredEncodings("latents", "training step of the emoji U-Net on stored latents", None))
register(StoredEncodings("latents-text", "the same on stored latents and text states", "fp16"))
