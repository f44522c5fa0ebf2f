"""Encoding of images and captions: what decodes them, and what encodes them.

Samples are encoded in batches that follow from their numbers alone, so that the results do not depend on which process encodes
them, nor on an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ldm.conditioning import Conditioner
from ldm.data.bad_samples import BadSample
from ldm.data.encoded import POSTERIOR, EncodedConfig, crop_places
from ldm.data.order import READ_AHEAD
from ldm.data.samples import Batch, BatchIndices, Samples, StoredImages
from ldm.data.shard_format import LATENTS, ORIGINAL_SIZE, STATES
from ldm.data.stream import batches_in_order
from ldm.data.teacher import TEACHER, Teacher
from ldm.data.transforms import to_tensor
from ldm.errors import DataError
from ldm.modalities.caption import CAPTION
from ldm.vae import FirstStage

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Types of stored values by their names in the config."""


@dataclass(frozen=True)
class DecodedSample:
    """A sample to be encoded.

    Attributes:
        key: its key.
        images: uint8 ``[crops h w 3]``.
        size: width and height of the stored image in pixels.
        captions: its captions.
        members: its annotations as stored, by suffix.
    """

    key: str
    images: np.ndarray
    size: tuple[int, int]
    captions: tuple[str, ...]
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class EncodedSample:
    """An encoded sample: its key, and its members by suffix."""

    key: str
    members: Mapping[str, bytes]


Engine = Callable[[np.ndarray], Iterator[Sequence[EncodedSample | BadSample]]]
"""Function that yields the samples of these numbers encoded, in order, in batches of ``batch_size``."""


def decode(images: StoredImages, index: np.ndarray, crops: int) -> list[DecodedSample | BadSample]:
    """Decode samples, each with its crops.

    Args:
        images: the set.
        index: numbers of the samples, int64 ``[b]``.
        crops: number of crops of each image; see :func:`ldm.data.encoded.crop_places`.
    """
    starts = np.cumsum((0, *images.lengths))
    first = int(np.searchsorted(starts, index[0], "right")) - 1
    images.shards.prepare(index, range(first, min(first + 1 + READ_AHEAD, len(images.lengths))))
    return [_decoded(images, i, crops) for i in index.tolist()]


def _decoded(images: StoredImages, i: int, crops: int) -> DecodedSample | BadSample:
    key = images.shards.keys[i]
    pixels = images.crops(i, crop_places(key, crops))
    if isinstance(pixels, BadSample):
        return pixels
    members = images.members(i)
    caption = members.get(CAPTION.suffix or "")
    captions = () if caption is None else tuple(text for text, _ in images.captions.parse(caption))
    return DecodedSample(key, pixels, images.original_size(i), captions, members)


class DecodedSamples(Samples):
    """Decoded samples in batches, ``samples``, for the processes that load data."""

    def __init__(self, images: StoredImages, crops: int):
        self._images, self._crops = images, crops
        self.lengths, self.workers, self.fingerprint = images.lengths, images.workers, images.fingerprint

    def __getitem__(self, draw: BatchIndices) -> Batch:
        return {"samples": decode(self._images, draw.index, self._crops)}


class Encoder:
    """First stage, text encoders and teacher that encode decoded samples.

    Args:
        first_stage: frozen.
        conditioner: the conditioner with the text encoders; None stores no text states.
        config: types, and size of a batch.
        flips: whether each crop is encoded mirrored too.
        teacher: network whose features of each variant are stored; None for none.
        device: where to encode.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        conditioner: Conditioner | None,
        config: EncodedConfig,
        *,
        flips: bool,
        teacher: Teacher | None = None,
        device: torch.device | str = "cpu",
    ):
        self.teacher = teacher
        if teacher is not None:
            teacher.network.to(device)
        self.first_stage = first_stage.eval().to(device)
        self.conditioner = None if conditioner is None else conditioner.eval().to(device)
        self.config, self.flips, self.device = config, flips, torch.device(device)

    def to(self, device: torch.device | str) -> Encoder:
        """Return an encoder on another device; the networks are moved."""
        return Encoder(
            self.first_stage, self.conditioner, self.config, flips=self.flips, teacher=self.teacher, device=device
        )

    @torch.inference_mode()
    def __call__(self, batch: Sequence[DecodedSample | BadSample]) -> list[EncodedSample | BadSample]:
        """Encode the samples of a batch; bad ones are returned as they are."""
        good = [sample for sample in batch if isinstance(sample, DecodedSample)]
        images, texts = iter(self._images(good)), iter(self._texts(good))
        return [self._encoded(each, images, texts) if isinstance(each, DecodedSample) else each for each in batch]

    def empty(self) -> bytes:
        """Return the text states of the empty caption as a safetensors file."""
        with torch.inference_mode():
            return save(self._states([""]))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _encoded(
        self, sample: DecodedSample, images: Iterator[dict[str, Tensor]], texts: Iterator[dict[str, Tensor]]
    ) -> EncodedSample:
        tensors = {**next(images), ORIGINAL_SIZE: torch.tensor(sample.size, dtype=torch.int32, device="cpu")}
        members = {LATENTS: save(tensors), **sample.members}
        if self.conditioner is not None:
            members[STATES] = save(next(texts))
        return EncodedSample(sample.key, members)

    def _images(self, samples: Sequence[DecodedSample]) -> list[dict[str, Tensor]]:
        """Return the posteriors of each sample, ``[v k z h w]``, and its features; images of one shape are encoded together."""
        found: dict[int, dict[str, Tensor]] = {}
        for shape in dict.fromkeys(sample.images.shape for sample in samples):
            rows = [row for row, sample in enumerate(samples) if sample.images.shape == shape]
            images = np.stack([samples[row].images for row in rows])
            variants = [
                each
                for crop in range(shape[0])
                for each in (images[:, crop], images[:, crop, :, ::-1])[: 1 + self.flips]
            ]
            tensors = [to_tensor(np.ascontiguousarray(each)).to(self.device) for each in variants]
            with self._autocast():
                columns = {POSTERIOR: [self.first_stage.encode(each).to_cache() for each in tensors]}
                if self.teacher is not None:
                    columns[TEACHER] = [self.teacher.encode(each) for each in tensors]
            stored = {
                name: _stored(torch.stack(each, dim=1), "latents", self.config.latents)
                for name, each in columns.items()
            }
            for i, row in enumerate(rows):
                found[row] = {name: each[i].contiguous() for name, each in stored.items()}
        return [found[row] for row in range(len(samples))]

    def _texts(self, samples: Sequence[DecodedSample]) -> list[dict[str, Tensor]]:
        """Return the outputs of the text encoders for the captions of each sample, ``[n ...]`` each."""
        if self.conditioner is None or not samples:
            return []
        texts, size = [text for sample in samples for text in sample.captions], self.config.batch_size
        parts = [self._states(texts[start : start + size]) for start in range(0, len(texts), size)]
        states = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        counts = [len(sample.captions) for sample in samples]
        split = {name: each.split(counts) for name, each in states.items()}
        return [{name: each[row].clone() for name, each in split.items()} for row in range(len(samples))]

    def _states(self, texts: Sequence[str]) -> dict[str, Tensor]:
        assert self.conditioner is not None
        assert self.config.text is not None
        with self._autocast():
            states = self.conditioner.encode_texts(texts)
        return {name: _stored(each, "text", self.config.text) for name, each in states.items()}


def _stored(values: Tensor, field: str, dtype: str) -> Tensor:
    """Return values on the CPU; floating-point numbers in the type that ``data.encoded.<field>`` names.

    Raises:
        DataError: that type cannot hold them.
    """
    if not values.is_floating_point():
        return values.cpu()
    converted = values.to("cpu", DTYPES[dtype])
    if not converted.isfinite().all():
        if not values.isfinite().all():
            raise DataError(
                f"some of the encoded {field} values are NaN or infinite; train or choose the encoder again."
            )
        other = "data.encoded.text to bf16" if field == "text" else "data.encoded.latents to fp32"
        raise DataError(f"{dtype} cannot hold some of the encoded {field} values; set {other}.")
    return converted


def local_engine(images: StoredImages, encoder: Encoder, crops: int) -> Engine:
    """Return the engine that encodes in this process, while other processes decode if ``data.workers`` is above 0."""

    def encoded(index: np.ndarray) -> Iterator[Sequence[EncodedSample | BadSample]]:
        for batch in batches_in_order(DecodedSamples(images, crops), index, encoder.config.batch_size):
            yield encoder(batch["samples"])

    return encoded
