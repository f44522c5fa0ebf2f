"""Benchmark of the training of a denoiser: live encoding against latents, and latents and text states, that are stored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.data.encoded_source import EncodedSource
    from ldm.data.samples import Samples
    from ldm.training.tasks import DenoiserTask

BATCHES = 8
"""Batches of different samples that are used in turn."""

Compare = Callable[[Callable[[], object], Callable[[], object], int], tuple[float, float]]


def bench_latents(config: Path, rounds: int, compare: Compare) -> None:
    """Print the time of a training step of an experiment's denoiser with live and with stored encodings, and their losses.

    A step reads a batch, computes loss and gradients, and updates the weights, on the device and in the precision of a training.
    The losses are compared in fp32. First stage and text encoder have random weights, which makes no difference to the time.
    """
    import torch

    from ldm.clip.tokenizer import train_byte_bpe
    from ldm.data.encoded_source import EncodedSource
    from ldm.data.encoding import DTYPES
    from ldm.devices import default_device
    from ldm.model import LatentDiffusion
    from ldm.training.experiment import load_config
    from ldm.training.tasks import DenoiserTask

    torch.manual_seed(0)
    experiment = load_config(config, ["data.cache_latents=false"])
    assert experiment.clip is not None
    words = experiment.clip.tokenizer
    model = LatentDiffusion(experiment.model_config, train_byte_bpe([""], words.vocab_size, words.context_length))
    device, train = default_device(), experiment.denoiser.train
    task, size = DenoiserTask(experiment.denoiser, model.to(device)), train.batch_size
    precision = experiment.trainer.precision_of(train)
    print(
        f"{config}: {device.type}, {precision}, batch {size}, {torch.get_num_threads()} threads, median of {rounds} rounds"
    )
    for text in (None, "fp16"):
        with tempfile.TemporaryDirectory() as folder:
            data: Any = experiment.data
            data = replace(data, encoded=replace(data.encoded, folder=folder, text=text))
            source = EncodedSource(data, model.first_stage, "none", model.conditioner)
            live = _Steps(task, source, data.open("train"), size, DTYPES[precision])
            stored = _Steps(task, source, _encoded(source, BATCHES * size), size, DTYPES[precision])
            times = compare(live.train, stored.train, rounds)
            losses = [float(each.loss(0, torch.float32).detach()) for each in (live, stored)]
        name = "latents and text" if text else "latents"
        print(
            f"stored {name:18}{1e3 * times[1]:8.1f}ms{'live':>8}{1e3 * times[0]:8.1f}ms{'live/stored':>14}"
            f"{times[0] / times[1]:6.2f}{'difference of losses':>24}{abs(losses[1] / losses[0] - 1):9.1e}"
        )


class _Steps:
    """Training steps of a denoiser on one set of samples."""

    def __init__(self, task: DenoiserTask, source: EncodedSource, samples: Samples, size: int, dtype: torch.dtype):
        from ldm.training.optim import adamw

        self.task, self.source, self.samples, self.size, self.number = task, source, samples, size, 0
        self.dtype, self.device = dtype, next(task.parameters()).device
        self.optimizer = adamw([task], task.config.train)

    def loss(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return the loss of a batch in a precision, with noise that its number determines."""
        import numpy as np
        import torch

        from ldm.data.samples import BatchIndices
        from ldm.training.tasks.task import Step, on_device

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
    shards = EncodedShards(joined(source.folder, "train"), encoding, config, samples)
    encode_shards(shards, range(len(shards)), local_engine(images, encoder, crops), int)
    if conditioner is not None:
        write_empty(source.folder, encoder)
    shards.finish()
    return source.open("train", images, device)
