"""Images of a stored set, decoded once and held in memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ldm.data.bad_samples import BAD, BadSample
from ldm.data.buckets import Buckets, Shape
from ldm.data.samples import Batch, BatchIndices, Samples, StoredImages, take
from ldm.data.transforms import to_tensor


class ImagesInMemory(Samples):
    """All images of a stored set as uint8, decoded once, at the first draw; each batch is then a gather.

    Args:
        stored: the set; its crop must not be random, since an image is cropped once.
    """

    def __init__(self, stored: StoredImages):
        assert not stored.random_crop
        self._stored = stored
        self.describe_as(stored)

    def annotations(self, draw: BatchIndices) -> Batch:
        stored, bad, row_of = self._annotations
        return self._batch(draw, bad, lambda good: self._stored.with_captions(take(stored, row_of[good.index]), good))

    def spatial_annotations(self, draw: BatchIndices) -> Batch:
        return self._stored.spatial_annotations(draw)

    def all_captions(self, reader: str) -> list[str]:
        return self._stored.all_captions(reader)

    @property
    def captions_fingerprint(self) -> str:
        return self._stored.captions_fingerprint

    def buckets(self) -> Buckets | None:
        return self._stored.buckets()

    def __getitem__(self, draw: BatchIndices) -> Batch:
        if not self._holds(draw):
            return self._stored[draw]
        images, row_of, bad = self._images

        def load(good: BatchIndices) -> Batch:
            image = to_tensor(self._stored.mirrored(images[draw.shape][row_of[good.index]], good))
            return {"image": image, **self.annotations(good), **self.spatial_annotations(good)}

        return self._batch(draw, bad, load)

    def _holds(self, draw: BatchIndices) -> bool:
        """Return True if the images of a draw are in memory in its shape: each is in that of its bucket only."""
        buckets = self.buckets()
        if buckets is None:
            return True
        return draw.shape is not None and bool(np.all(buckets.of[draw.index] == buckets.shapes.index(draw.shape)))

    @staticmethod
    def _batch(draw: BatchIndices, bad: Mapping[int, BadSample], load: Callable[[BatchIndices], Batch]) -> Batch:
        """Return the batch of a draw, of which ``load`` loads the samples that are not bad."""
        found = {row: bad[i] for row, i in enumerate(draw.index.tolist()) if i in bad} if bad else {}
        if not found:
            return load(draw)
        good = draw.without(found)
        return {**(load(good) if len(good) else {}), BAD: found}

    @functools.cached_property
    def _annotations(self) -> tuple[Batch, dict[int, BadSample], np.ndarray]:
        """Annotations of the good samples, the bad ones by number, and ``[n]``, the row of each good sample."""
        batch = self._stored.stored_annotations(BatchIndices(np.arange(len(self))))
        bad = batch.pop(BAD, {})
        good = np.ones(len(self), bool)
        good[list(bad)] = False
        return batch, bad, np.cumsum(good) - 1

    @functools.cached_property
    def _images(self) -> tuple[dict[Shape | None, np.ndarray], np.ndarray, dict[int, BadSample]]:
        """uint8 ``[n h w 3]`` by shape (None without buckets), the row of each sample there, and bad samples by number."""
        from tqdm import tqdm

        fit = self._stored.fit
        images, row_of = {}, np.empty(len(self), np.int64)
        bad = dict(self._annotations[1])
        with (
            ThreadPoolExecutor(
                max(1, self._stored.workers)
            ) as pool,  # Pillow decodes outside of the interpreter's lock
            tqdm(desc="decoding", total=len(self), unit="image", leave=False) as bar,
        ):
            for shape, numbers in self.by_shape().items():
                images[shape] = np.zeros((len(numbers), *(shape or (fit.height, fit.width)), 3), np.uint8)
                row_of[numbers] = np.arange(len(numbers))
                decoded = pool.map(self._stored.image, numbers.tolist(), itertools.repeat(shape))
                for row, image in enumerate(decoded):
                    if isinstance(image, BadSample):
                        bad[int(numbers[row])] = image
                    else:
                        images[shape][row] = image
                    bar.update()
        return images, row_of, bad
