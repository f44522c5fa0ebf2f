"""Encoded samples: posteriors and text states of a set of images in shards, from which the denoiser is trained.

``tools/encode.py`` writes them. A sample has the annotations of its image as they were stored, and

- ``key.latents.safetensors``: ``posterior [v k z h w]``, the k tensors by which the first stage's class of posteriors is
  cached (:attr:`ldm.vae.Posterior.cached`), for each of v variants of the image; ``size``, width and height of the stored image;
  ``teacher [v z h w]``, the features of the variants that a loss compares the denoiser with, if it does;
- ``key.text.safetensors``: the outputs of the frozen text encoders, ``[n ...]`` each, for the n captions of the sample.

The variants of a training image are its crops, each followed by its mirror image if the data is mirrored. Which one is used
follows from the jitter of a draw, as crops and flips of images do.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ldm.conditioning.text_states import TEXT_STATES
from ldm.config import config_field
from ldm.data.samples import Batch, BatchIndices, SourceShare, StoredImages
from ldm.data.shard_format import LATENTS, ORIGINAL_SIZE, STATES
from ldm.data.shards import Shards
from ldm.data.teacher import TEACHER
from ldm.errors import ConfigError, DataError
from ldm.modalities.caption import CAPTION
from ldm.modalities.crop import Crop

POSTERIOR = "posterior"
"""Name of the tensor in ``latents.safetensors`` with the variants of an image."""

CENTER = (0.5, 0.5)


@dataclass(frozen=True)
class EncodedConfig:
    """Latents and text states of the data, encoded once by tools/encode.py."""

    folder: str | None = config_field(
        None,
        "Folder or URL of latents and text states that tools/encode.py writes, and that the denoiser is then trained on; null: "
        "none.",
        path=True,
    )
    crops: int = config_field(
        4, "Number of crops of each training image with crop: random: the center and others at random positions."
    )
    latents: Literal["fp16", "fp32"] = config_field("fp16", "Type of the stored latents.")
    text: Literal["fp16", "bf16", "fp32"] | None = config_field(
        "fp16", "Type of the stored outputs of frozen text encoders; null: captions are encoded in training."
    )
    precision: Literal["fp32", "bf16"] = config_field(
        "fp32", "Precision in which the encoders compute; bf16 is autocast, which is faster on GPUs."
    )
    batch_size: int = config_field(32, "Number of images or captions that are encoded at once.")
    shard_size: int = config_field(1024, "Number of samples in a shard; a multiple of batch_size.")

    def __post_init__(self) -> None:
        if min(self.crops, self.batch_size, self.shard_size) < 1:
            raise ConfigError("crops, batch_size and shard_size must be at least 1.")
        if self.shard_size % self.batch_size:
            raise ConfigError(f"shard_size is {self.shard_size}, not a multiple of batch_size, {self.batch_size}.")


@dataclass(frozen=True)
class Variant(Crop):
    """Crop of an encoded image; ``number`` is its row in the stored posteriors."""

    number: int


class EncodedImages(StoredImages):
    """Encoded images, in batches with the tensors ``names`` of their posteriors, fp32 ``[b z h w]`` channels_last, as ``image``.

    The outputs of text encoders for the caption of each sample are ``text_states.<name>``, ``[b ...]`` as they are stored.

    Args:
        images: the images that were encoded, with the same settings.
        shards: their encoded samples.
        names: names of the stored tensors, in order: ``cached`` of the class of posteriors.
        crops: number of crops of each image.
        flips: whether each crop is followed by its mirror image.
        text: whether to read text states.
        teacher: whether to read the features of the teacher.
        mixture: see :class:`~ldm.data.samples.Samples`; of the encoded shards.
    """

    def __init__(
        self,
        images: StoredImages,
        shards: Shards,
        names: tuple[str, ...],
        *,
        crops: int,
        flips: bool,
        text: bool,
        teacher: bool = False,
        mixture: Sequence[SourceShare] = (),
    ):
        super().__init__(
            shards,
            images.fit,
            background=images.background,
            random_crop=images.random_crop,
            flip=images.flip and flips,
            sizes=images.sizes,
            captions=images.captions,
            workers=images.workers,
            mixture=mixture,
            shapes=images.shapes,
        )
        self._images = images
        self.selection = images.selection
        self.dropped, self.fingerprint = [*images.dropped, *shards.dropped], images.fingerprint
        self._names, self._crop_count, self._flipped, self._text = names, crops, flips, text
        self._teacher = teacher

    def __getitem__(self, draw: BatchIndices) -> Batch:
        """Return the encoded samples of a draw; images if they are not to have the shape of their buckets, as in previews."""
        if (draw.shape is None) != (not self.shapes):
            return self._images[draw]
        batch = super().__getitem__(draw)
        for name in self._names:
            if name in batch:
                batch[name] = batch[name].float().contiguous(memory_format=torch.channels_last)
        return batch

    def with_captions(self, batch: Batch, draw: BatchIndices) -> Batch:
        states: list[dict[str, Tensor]] = batch.pop(TEXT_STATES, [])
        chosen = super().with_captions(batch, draw)
        if not states:
            return chosen
        texts = zip(batch[CAPTION.key], chosen[CAPTION.key], strict=True)
        rows = [[text for text, _ in captions].index(text) for captions, text in texts]
        for name in states[0]:
            column = [each[name][row] for each, row in zip(states, rows, strict=True)]
            chosen[f"{TEXT_STATES}.{name}"] = torch.stack(column)
        return chosen

    def _pixels(self, i: int, crop: Crop) -> dict[str, Any]:
        assert isinstance(crop, Variant)
        tensors = self._tensors(i, LATENTS)
        values: dict[str, Any] = dict(zip(self._names, tensors[POSTERIOR][crop.number], strict=True))
        values |= {TEACHER: tensors[TEACHER][crop.number].float()} if self._teacher else {}
        return values | ({TEXT_STATES: self._tensors(i, STATES)} if self._text else {})

    def _crops(self, draw: BatchIndices) -> Iterator[Crop]:
        fit, count = self.fit_of(draw), self._crop_count
        random = draw.jitter is not None and self.random_crop
        numbers = (draw.jitter[:, 0] * count).astype(int) if random else np.zeros(len(draw), int)  # type: ignore[index]
        for i, number, flip in zip(draw.index.tolist(), numbers.tolist(), self._flips(draw).tolist(), strict=True):
            y, x = crop_places(self.shards.keys[i], count)[number]
            row = number * (1 + self._flipped) + flip
            yield Variant(fit, y, x, flip, functools.partial(self.original_size, i), row)

    def original_size(self, i: int) -> tuple[int, int]:
        width, height = self._tensors(i, LATENTS)[ORIGINAL_SIZE].tolist()
        return width, height

    def _tensors(self, i: int, column: str) -> dict[str, Tensor]:
        try:
            return load(self.shards.member(i, column))
        except SafetensorError:
            raise DataError(f"the .{column} of {self.shards.where(i)} is damaged; encode the data again.") from None


def crop_places(key: str, count: int) -> np.ndarray:
    """Return the positions (y, x) of the crops of an image in [0, 1], ``[count 2]``: the center, and others by its key."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
    return np.concatenate([[CENTER], np.random.default_rng(seed).random((count - 1, 2))])
