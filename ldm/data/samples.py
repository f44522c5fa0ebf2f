"""Sets of samples from which batches are drawn by number: on disk, or in memory.

``samples[draw]`` is one batch, a dict of ``image`` (fp32 ``[b c h w]`` in [-1, 1], channels_last), ``text``
and ``key`` (lists of ``b``) and, for labelled sets, ``label`` (int64 ``[b]``). It depends on the draw alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.shards import Shards
from ldm.data.transforms import Fit, decode, to_tensor
from ldm.errors import DataError

Batch = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """The samples of one batch.

    Args:
        index: int64 ``[b]``, sample numbers.
        jitter: ``[b 3]`` uniform in [0, 1): place of the cut (y, x) and flip, of each sample. None: no
            augmentation.
    """

    index: np.ndarray
    jitter: np.ndarray | None = None


class Samples(Dataset[Batch]):
    """A set of samples; the interface that streams, caches and evaluation share.

    Attributes:
        lengths: number of samples of each file that is best read in sequence; they add up to ``len``.
        workers: processes that should make batches ahead; 0 where that costs more than it brings.
        fingerprint: text that changes when the undrawn pictures do.
    """

    lengths: Sequence[int]
    workers: int = 0
    fingerprint: str

    def __len__(self) -> int:
        return sum(self.lengths)

    def annotations(self, index: np.ndarray) -> Batch:
        """All of a batch but its pictures: ``text``, ``key`` and perhaps ``label``."""
        raise NotImplementedError

    def __getitem__(self, draw: Draw) -> Batch:
        raise NotImplementedError


class StoredPictures(Samples):
    """Pictures in shards, decoded when drawn.

    Args:
        shards: where they are.
        fit: size to which they are brought.
        random_crop: place the cut by the draw's jitter instead of in the middle.
        flip: mirror half of the draws, left to right.
        workers: processes that decode.
    """

    def __init__(self, shards: Shards, fit: Fit, *, random_crop: bool = False, flip: bool = False, workers: int = 0):
        self.shards, self.fit, self.random_crop, self.flip, self.workers = (
            shards,
            fit,
            random_crop,
            flip,
            workers,
        )
        self.lengths = shards.lengths
        self.fingerprint = f"{shards.fingerprint}-{fit.height}x{fit.width}"

    def annotations(self, index: np.ndarray) -> Batch:
        batch: Batch = {
            "text": [self.shards.text(i) for i in index],
            "key": [self.shards.keys[i] for i in index],
        }
        if self.shards.labelled:
            batch["label"] = torch.tensor([self.shards.label(i) for i in index])
        return batch

    def __getitem__(self, draw: Draw) -> Batch:
        centre = np.full((len(draw.index), 2), 0.5)
        places = draw.jitter[:, :2] if draw.jitter is not None and self.random_crop else centre
        pictures = np.stack([self.picture(i, y, x) for i, (y, x) in zip(draw.index, places, strict=True)])
        image = to_tensor(_mirrored(pictures, draw) if self.flip else pictures)
        return {"image": image, **self.annotations(draw.index)}

    def picture(self, i: int, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """Picture ``i`` as uint8 ``[h w 3]``, cut at (y, x)."""
        try:
            # Twice the wanted size leaves Lanczos enough to average over.
            picture = decode(self.shards.picture(i), enough=(2 * self.fit.height, 2 * self.fit.width))
        except DataError as error:
            raise DataError(f"the picture {self.shards.where(i)} {error}; take it out of the shard.") from None
        return self.fit(picture, y, x)


class PicturesInMemory(Samples):
    """All pictures of a stored set as uint8, decoded once, at the first draw: a batch is then a gather.

    Args:
        stored: the set; its place of the cut must not be random, since a picture is cut once.
    """

    def __init__(self, stored: StoredPictures):
        assert not stored.random_crop
        self._stored = stored
        self.lengths, self.fingerprint = stored.lengths, stored.fingerprint

    def annotations(self, index: np.ndarray) -> Batch:
        return take(self._annotations, index)

    def __getitem__(self, draw: Draw) -> Batch:
        pictures = self._pictures[draw.index]
        image = to_tensor(_mirrored(pictures, draw) if self._stored.flip else pictures)
        return {"image": image, **self.annotations(draw.index)}

    @functools.cached_property
    def _annotations(self) -> Batch:
        return self._stored.annotations(np.arange(len(self)))

    @functools.cached_property
    def _pictures(self) -> np.ndarray:
        """uint8 ``[n h w 3]``."""
        from tqdm import tqdm

        fit = self._stored.fit
        pictures = np.empty((len(self), fit.height, fit.width, 3), np.uint8)
        with ThreadPoolExecutor(
            max(1, self._stored.workers)
        ) as pool:  # Pillow decodes outside of the interpreter's lock
            decoded = pool.map(self._stored.picture, range(len(self)))
            for i, picture in enumerate(tqdm(decoded, "decoding", len(self), unit="picture", leave=False)):
                pictures[i] = picture
        return pictures


class TensorsInMemory(Samples):
    """Samples that were never files: toy sets.

    Args:
        image: fp32 ``[n c h w]``.
        text: ``n`` captions.
        key: ``n`` unique names.
        label: int64 ``[n]`` or None.
    """

    def __init__(self, image: Tensor, text: Sequence[str], key: Sequence[str], label: Tensor | None = None):
        self._image = image.to(memory_format=torch.channels_last)
        self._annotations = {"text": text, "key": key} | ({} if label is None else {"label": label})
        self.lengths = [len(image)]
        self.fingerprint = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).hexdigest()

    def annotations(self, index: np.ndarray) -> Batch:
        return take(self._annotations, index)

    def __getitem__(self, draw: Draw) -> Batch:
        return {"image": self._image[torch.from_numpy(draw.index)], **self.annotations(draw.index)}


def take(batch: Batch, index: np.ndarray) -> Batch:
    """The entries ``index`` of every tensor and list of a batch."""
    return {
        name: value[torch.from_numpy(index)] if isinstance(value, Tensor) else [value[i] for i in index]
        for name, value in batch.items()
    }


def _mirrored(pictures: np.ndarray, draw: Draw) -> np.ndarray:
    """uint8 ``[b h w c]`` with those whose third jitter is under one half mirrored."""
    if draw.jitter is None:
        return pictures
    return np.where((draw.jitter[:, 2] < 0.5)[:, None, None, None], pictures[:, :, ::-1], pictures)
