"""Sets of samples, on disk or in memory, from which batches are taken by index.

``samples[draw]`` is one batch, a dict of ``image`` (fp32 ``[b c h w]`` in [-1, 1], channels_last), ``key`` (a list of ``b``) and,
for sets that have them, the values of modalities by key, such as ``text`` (a list of ``b``), ``label`` (int64 ``[b]``) or
``semantic`` (int64 ``[b h w]``); see :mod:`ldm.modalities`. It depends on ``draw`` alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.shards import Shards
from ldm.data.transforms import decode, to_tensor
from ldm.errors import DataError, StorageError
from ldm.image_files import image_size
from ldm.modalities import MODALITIES
from ldm.modalities.crop import WHITE, Color, Crop, Fit

Batch = dict[str, Any]


@dataclass(frozen=True)
class BatchIndices:
    """The samples of one batch.

    Args:
        index: int64 ``[b]``, sample numbers.
        jitter: ``[b 3]`` uniform in [0, 1): position of the crop (y, x) and flip, of each sample. None: no
            augmentation.
        ahead: numbers of the shards that are read now and next, in order, if shards are read in sequence.
    """

    index: np.ndarray
    jitter: np.ndarray | None = None
    ahead: tuple[int, ...] = ()


class Samples(Dataset[Batch]):
    """A set of samples; the interface that streams, caches and evaluation share.

    Attributes:
        lengths: number of samples of each file that is best read in sequence; they add up to ``len``.
        workers: number of processes that prefetch batches; 0 if prefetching costs more than it saves.
        fingerprint: text that depends on the images before augmentation.
    """

    lengths: Sequence[int]
    workers: int = 0
    fingerprint: str

    def __len__(self) -> int:
        return sum(self.lengths)

    def annotations(self, index: np.ndarray) -> Batch:
        """Return ``key`` and all other values that do not depend on how the images are cropped."""
        raise NotImplementedError

    def spatial_annotations(self, draw: BatchIndices) -> Batch:
        """Return annotations that refer to positions in the images, such as boxes, for the crops of this draw."""
        return {}

    def __getitem__(self, draw: BatchIndices) -> Batch:
        raise NotImplementedError


class StoredImages(Samples):
    """Images in shards, decoded when drawn.

    Args:
        shards: source of the images.
        fit: resizing to the target size.
        background: colour behind transparency.
        random_crop: position the crop by the draw's jitter instead of in the centre.
        flip: mirror half of the draws, left to right.
        sizes: add the modalities that are computed from the crop; this reads the header of each image's file.
        workers: number of processes that decode.
    """

    def __init__(
        self,
        shards: Shards,
        fit: Fit,
        *,
        background: Color = WHITE,
        random_crop: bool = False,
        flip: bool = False,
        sizes: bool = False,
        workers: int = 0,
    ):
        self.shards, self.fit, self.background, self.workers = shards, fit, background, workers
        self.random_crop, self.flip, self.sizes = random_crop, flip, sizes
        self.lengths = shards.lengths
        self.fingerprint = f"{shards.fingerprint}-{fit.height}x{fit.width}"
        if type(fit) is not Fit or background != WHITE:  # earlier versions had neither
            self.fingerprint += f"-{fit}-{background}"

    def annotations(self, index: np.ndarray) -> Batch:
        batch: Batch = {"key": [self.shards.keys[i] for i in index]}
        for key, modality in self.shards.modalities.items():
            if not modality.spatial:
                batch[key] = modality.collate([self.shards.value(i, modality) for i in index])
        return batch

    def spatial_annotations(self, draw: BatchIndices) -> Batch:
        stored = [modality for modality in self.shards.modalities.values() if modality.spatial]
        derived = [modality for modality in MODALITIES.values() if modality.from_crop is not None] if self.sizes else []
        crops = list(self._crops(draw)) if stored or derived else []
        batch: Batch = {}
        for modality in stored:
            values = (self.shards.value(i, modality) for i in draw.index)
            cropped = [modality.crop(value, crop) for value, crop in zip(values, crops, strict=True)]
            batch[modality.key] = modality.collate(cropped)
        for modality in derived:
            assert modality.from_crop is not None
            batch[modality.key] = modality.collate([modality.from_crop(crop) for crop in crops])
        return batch

    def __getitem__(self, draw: BatchIndices) -> Batch:
        self.shards.prepare(draw.index, draw.ahead)
        images = [self.image(i, crop.y, crop.x) for i, crop in zip(draw.index, self._crops(draw), strict=True)]
        return {
            "image": to_tensor(self.mirrored(np.stack(images), draw)),
            **self.annotations(draw.index),
            **self.spatial_annotations(draw),
        }

    def image(self, i: int, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """Return image ``i`` as uint8 ``[h w 3]``, cropped at (y, x)."""
        try:
            # Twice the target size leaves enough pixels for Lanczos to average.
            enough = (2 * self.fit.height, 2 * self.fit.width)
            image = decode(self.shards.image(i), enough, self.background)
        except StorageError:
            raise
        except DataError as error:
            raise DataError(f"the image {self.shards.where(i)} {error}; remove it from the shard.") from None
        return self.fit(image, y, x)

    def mirrored(self, images: np.ndarray, draw: BatchIndices) -> np.ndarray:
        """Return the images ``[b h w ...]`` of a draw, mirrored where the draw requires it."""
        flips = self._flips(draw)
        return (
            np.where(flips.reshape(-1, *[1] * (images.ndim - 1)), images[:, :, ::-1], images) if self.flip else images
        )

    def _crops(self, draw: BatchIndices) -> Iterator[Crop]:
        """Yield the crop of each sample of a draw."""
        centre = np.full((len(draw.index), 2), 0.5)
        places = draw.jitter[:, :2] if draw.jitter is not None and self.random_crop else centre
        for i, (y, x), flip in zip(draw.index, places, self._flips(draw), strict=True):
            yield Crop(self.fit, y, x, flip, functools.partial(self._size, i))

    def _flips(self, draw: BatchIndices) -> np.ndarray:
        """Return ``[b]`` of bool: True for each mirrored image."""
        if draw.jitter is None or not self.flip:
            return np.zeros(len(draw.index), bool)
        return draw.jitter[:, 2] < 0.5

    def _size(self, i: int) -> tuple[int, int]:
        return image_size(self.shards.image(i))


class ImagesInMemory(Samples):
    """All images of a stored set as uint8, decoded once, at the first draw; each batch is then a gather.

    Args:
        stored: the set; its crop must not be random, since an image is cropped once.
    """

    def __init__(self, stored: StoredImages):
        assert not stored.random_crop
        self._stored = stored
        self.lengths, self.fingerprint = stored.lengths, stored.fingerprint

    def annotations(self, index: np.ndarray) -> Batch:
        return take(self._annotations, index)

    def spatial_annotations(self, draw: BatchIndices) -> Batch:
        return self._stored.spatial_annotations(draw)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        image = to_tensor(self._stored.mirrored(self._images[draw.index], draw))
        return {"image": image, **self.annotations(draw.index), **self.spatial_annotations(draw)}

    @functools.cached_property
    def _annotations(self) -> Batch:
        return self._stored.annotations(np.arange(len(self)))

    @functools.cached_property
    def _images(self) -> np.ndarray:
        """uint8 ``[n h w 3]``."""
        from tqdm import tqdm

        fit = self._stored.fit
        images = np.empty((len(self), fit.height, fit.width, 3), np.uint8)
        with ThreadPoolExecutor(
            max(1, self._stored.workers)
        ) as pool:  # Pillow decodes outside of the interpreter's lock
            decoded = pool.map(self._stored.image, range(len(self)))
            for i, image in enumerate(tqdm(decoded, "decoding", len(self), unit="image", leave=False)):
                images[i] = image
        return images


class TensorsInMemory(Samples):
    """Samples given as tensors, for toy sets.

    Args:
        image: fp32 ``[n c h w]``.
        text: ``n`` captions.
        key: ``n`` unique names.
        annotations: values of further modalities by key, of all samples: tensors ``[n ...]`` or lists.
    """

    def __init__(
        self,
        image: Tensor,
        text: Sequence[str],
        key: Sequence[str],
        annotations: Mapping[str, Any] | None = None,
    ):
        self._image = image.to(memory_format=torch.channels_last)
        self._annotations = {"text": text, "key": key, **(annotations or {})}
        self.lengths = [len(image)]
        self.fingerprint = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).hexdigest()

    def annotations(self, index: np.ndarray) -> Batch:
        return take(self._annotations, index)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        return {"image": self._image[torch.from_numpy(draw.index)], **self.annotations(draw.index)}


def captions_of(batch: Mapping[str, Any], reader: str) -> list[str]:
    """Return the captions of a batch, which ``reader`` needs.

    Raises:
        DataError: the data has none.
    """
    if "text" not in batch:
        raise DataError(f"{reader} needs captions, but the data has none; give each sample a .txt.")
    captions: list[str] = batch["text"]
    return captions


def take(batch: Batch, index: np.ndarray) -> Batch:
    """Return the entries ``index`` of every tensor and list of a batch."""
    return {
        name: value[torch.from_numpy(index)] if isinstance(value, Tensor) else [value[i] for i in index]
        for name, value in batch.items()
    }
