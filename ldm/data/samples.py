"""Sets of samples from which batches are drawn by number: on disk, or in memory.

``samples[draw]`` is one batch, a dict of ``image`` (fp32 ``[b c h w]`` in [-1, 1], channels_last), ``text``
and ``key`` (lists of ``b``) and, for sets that have them, ``label`` (int64 ``[b]``), ``boxes`` (a list of ``b``
lists of (class, x0, y0, x1, y1), corners in [0, 1]), ``semantic`` (int64 ``[b h w]``, a class a pixel),
``original_size`` (a list of ``b`` (height, width) in pixels) and ``crops_coords_top_left`` (of (top, left) of the cut in
the resized original). It depends on the draw alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.conditioning.boxes import Box
from ldm.data.shards import Shards
from ldm.data.transforms import Fit, decode, size_of, to_tensor
from ldm.errors import DataError
from ldm.image_io import decode_map

Batch = dict[str, Any]


@dataclass(frozen=True)
class BatchIndices:
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
        fingerprint: text that changes when the undrawn images do.
    """

    lengths: Sequence[int]
    workers: int = 0
    fingerprint: str

    def __len__(self) -> int:
        return sum(self.lengths)

    def annotations(self, index: np.ndarray) -> Batch:
        """What is said of whole images: ``text``, ``key`` and perhaps ``label``."""
        raise NotImplementedError

    def layout(self, draw: BatchIndices) -> Batch:
        """What is said of places in the images of a draw: ``boxes``, ``semantic`` and sizes, where the set has them."""
        return {}

    def __getitem__(self, draw: BatchIndices) -> Batch:
        raise NotImplementedError


class StoredPictures(Samples):
    """Pictures in shards, decoded when drawn.

    Args:
        shards: where they are.
        fit: size to which they are brought.
        random_crop: place the cut by the draw's jitter instead of in the middle.
        flip: mirror half of the draws, left to right.
        sizes: tell original sizes and cuts, which takes a look into each image's file.
        workers: processes that decode.
    """

    def __init__(
        self,
        shards: Shards,
        fit: Fit,
        *,
        random_crop: bool = False,
        flip: bool = False,
        sizes: bool = False,
        workers: int = 0,
    ):
        self.shards, self.fit, self.workers = shards, fit, workers
        self.random_crop, self.flip, self.sizes = random_crop, flip, sizes
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

    def layout(self, draw: BatchIndices) -> Batch:
        batch: Batch = {}
        if self.shards.boxed:
            boxes = [self.boxes(i, y, x) for i, y, x in self._cuts(draw)]
            batch["boxes"] = _mirrored_boxes(boxes, draw) if self.flip else boxes
        if self.shards.mapped:
            maps = np.stack([self.semantic(i, y, x) for i, y, x in self._cuts(draw)])
            batch["semantic"] = torch.from_numpy(_mirrored(maps, draw) if self.flip else maps)
        if self.sizes:
            originals = [size_of(self.shards.picture(i)) for i in draw.index]
            places = [
                self.fit.place(size, y, 1 - x if flipped and self.flip else x)
                for size, (_, y, x), flipped in zip(originals, self._cuts(draw), _flips(draw), strict=True)
            ]
            batch["original_size"] = [(height, width) for width, height in originals]
            batch["crops_coords_top_left"] = places
        return batch

    def __getitem__(self, draw: BatchIndices) -> Batch:
        pictures = np.stack([self.picture(i, y, x) for i, y, x in self._cuts(draw)])
        image = to_tensor(_mirrored(pictures, draw) if self.flip else pictures)
        return {"image": image, **self.annotations(draw.index), **self.layout(draw)}

    def _cuts(self, draw: BatchIndices) -> Iterator[tuple[int, float, float]]:
        """Sample number and place of the cut (y, x) of each sample of a draw."""
        centre = np.full((len(draw.index), 2), 0.5)
        places = draw.jitter[:, :2] if draw.jitter is not None and self.random_crop else centre
        for i, (y, x) in zip(draw.index, places, strict=True):
            yield i, y, x

    def picture(self, i: int, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """Picture ``i`` as uint8 ``[h w 3]``, cut at (y, x)."""
        try:
            # Twice the wanted size leaves Lanczos enough to average over.
            picture = decode(self.shards.picture(i), enough=(2 * self.fit.height, 2 * self.fit.width))
        except DataError as error:
            raise DataError(f"the image {self.shards.where(i)} {error}; take it out of the shard.") from None
        return self.fit(picture, y, x)

    def boxes(self, i: int, y: float = 0.5, x: float = 0.5) -> list[Box]:
        """The boxes of sample ``i`` in its image cut at (y, x)."""
        return self.fit.boxes(self.shards.boxes(i), size_of(self.shards.picture(i)), y, x)

    def semantic(self, i: int, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """The map of sample ``i`` as int64 ``[h w]``, cut at (y, x)."""
        try:
            return self.fit.semantic(decode_map(self.shards.semantic(i)), y, x)
        except DataError as error:
            raise DataError(f"the semantic map of {self.shards.where(i)} {error}.") from None


class PicturesInMemory(Samples):
    """All images of a stored set as uint8, decoded once, at the first draw: a batch is then a gather.

    Args:
        stored: the set; its place of the cut must not be random, since an image is cut once.
    """

    def __init__(self, stored: StoredPictures):
        assert not stored.random_crop
        self._stored = stored
        self.lengths, self.fingerprint = stored.lengths, stored.fingerprint

    def annotations(self, index: np.ndarray) -> Batch:
        return take(self._annotations, index)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        pictures = self._pictures[draw.index]
        image = to_tensor(_mirrored(pictures, draw) if self._stored.flip else pictures)
        return {"image": image, **self.annotations(draw.index), **self.layout(draw)}

    def layout(self, draw: BatchIndices) -> Batch:
        return self._stored.layout(draw)

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
        layout: ``boxes`` and ``semantic`` of all samples, or None.
    """

    def __init__(
        self,
        image: Tensor,
        text: Sequence[str],
        key: Sequence[str],
        label: Tensor | None = None,
        layout: Batch | None = None,
    ):
        self._image = image.to(memory_format=torch.channels_last)
        self._annotations = {"text": text, "key": key} | ({} if label is None else {"label": label})
        self._layout = layout or {}
        self.lengths = [len(image)]
        self.fingerprint = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).hexdigest()

    def annotations(self, index: np.ndarray) -> Batch:
        return take(self._annotations, index)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        image = self._image[torch.from_numpy(draw.index)]
        return {"image": image, **self.annotations(draw.index), **self.layout(draw)}

    def layout(self, draw: BatchIndices) -> Batch:
        return take(self._layout, draw.index)


def take(batch: Batch, index: np.ndarray) -> Batch:
    """The entries ``index`` of every tensor and list of a batch."""
    return {
        name: value[torch.from_numpy(index)] if isinstance(value, Tensor) else [value[i] for i in index]
        for name, value in batch.items()
    }


def _mirrored(pictures: np.ndarray, draw: BatchIndices) -> np.ndarray:
    """``[b h w ...]`` with those of :func:`_flips` mirrored."""
    flips = _flips(draw).reshape(-1, *[1] * (pictures.ndim - 1))
    return np.where(flips, pictures[:, :, ::-1], pictures)


def _mirrored_boxes(boxes: list[list[Box]], draw: BatchIndices) -> list[list[Box]]:
    """The boxes of the images that :func:`_mirrored` makes."""
    return [
        [(label, 1 - x1, y0, 1 - x0, y1) for label, x0, y0, x1, y1 in each] if flip else each
        for each, flip in zip(boxes, _flips(draw), strict=True)
    ]


def _flips(draw: BatchIndices) -> np.ndarray:
    """``[b]`` of bool: which are mirrored, in a set that mirrors."""
    return np.zeros(len(draw.index), bool) if draw.jitter is None else draw.jitter[:, 2] < 0.5
