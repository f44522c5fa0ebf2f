"""Sets of samples, on disk or in memory, from which batches are taken by index.

``samples[draw]`` is one batch, a dict of ``image`` (fp32 ``[b c h w]`` in [-1, 1], channels_last), ``key`` (a list of ``b``) and,
for sets that have them, the values of modalities by key, such as ``text`` (a list of ``b``), ``label`` (int64 ``[b]``) or
``semantic`` (int64 ``[b h w]``); see :mod:`ldm.modalities`. It depends on ``draw`` alone.

Samples that cannot be decoded are left out of the batch, which then has fewer rows, and are listed as ``bad``: a dict of
:class:`~ldm.data.bad_samples.BadSample` by row of the draw. If all are bad, this is the only key.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.bad_samples import BAD, BadSample, Reason, SampleError
from ldm.data.buckets import Buckets, Shape, image_sizes, nearest
from ldm.data.caption_choice import CaptionConfig
from ldm.data.filters import Selection
from ldm.data.shards import Shards
from ldm.data.transforms import decode, to_tensor
from ldm.errors import DataError, MissingCaptionsError, StorageError
from ldm.image_files import image_size
from ldm.modalities import MODALITIES, Modality
from ldm.modalities.caption import CAPTION
from ldm.modalities.crop import WHITE, Color, Crop, Fit

Batch = dict[str, Any]

Reader = Callable[[int, Crop], dict[str, Any]]
"""Function that reads values of a sample, by its number and crop; it raises a SampleError if they cannot be decoded."""


@dataclass(frozen=True)
class BatchIndices:
    """The samples of one batch.

    Args:
        index: int64 ``[b]``, sample numbers.
        jitter: ``[b 3]`` uniform in [0, 1): position of the crop (y, x) and flip, of each sample; it also seeds the choice
            of its caption. None: no augmentation.
        start: position of the first sample in the sequence of a training; None outside of training.
        ahead: numbers of the shards that are read now and next, in order, if shards are read in sequence.
        shape: height and width of the images, that of their bucket; None: the size of the set.
    """

    index: np.ndarray
    jitter: np.ndarray | None = None
    start: int | None = None
    ahead: tuple[int, ...] = ()
    shape: Shape | None = None

    def __len__(self) -> int:
        return len(self.index)

    def without(self, rows: Iterable[int]) -> BatchIndices:
        """Return the draw without some of its rows."""
        kept = np.ones(len(self), bool)
        kept[list(rows)] = False
        return BatchIndices(self.index[kept], None if self.jitter is None else self.jitter[kept], shape=self.shape)


@dataclass(frozen=True)
class SourceShare:
    """One of several sources of a set: the number of its files, and its weight among the sources."""

    files: int
    weight: float


class Samples(Dataset[Batch]):
    """A set of samples; the interface that streams, caches and evaluation share.

    Attributes:
        lengths: number of samples of each file that is best read in sequence; they add up to ``len``.
        workers: number of processes that prefetch batches; 0 if prefetching costs more than it saves.
        mixture: files and weight of each of the sources that are mixed, in the order of the files; empty for a single source.
        fingerprint: text that depends on the images before augmentation.
        dropped: samples that the set does not contain, since they were found to be bad when it was opened.
        selection: what ``data.filters`` dropped; None if the set has no filters.
    """

    lengths: Sequence[int]
    workers: int = 0
    mixture: Sequence[SourceShare] = ()
    fingerprint: str
    dropped: Sequence[BadSample] = ()
    selection: Selection | None = None

    def __len__(self) -> int:
        return sum(self.lengths)

    def annotations(self, draw: BatchIndices) -> Batch:
        """Return ``key`` and all other values that do not depend on how the images are cropped."""
        raise NotImplementedError

    def spatial_annotations(self, draw: BatchIndices) -> Batch:
        """Return annotations that refer to positions in the images, such as boxes, for the crops of this draw."""
        return {}

    def __getitem__(self, draw: BatchIndices) -> Batch:
        raise NotImplementedError

    def buckets(self) -> Buckets | None:
        """Return the aspect buckets of the samples; None if all images are of one size."""
        return None

    def by_shape(self) -> dict[Shape | None, np.ndarray]:
        """Return the numbers of the samples of each bucket by its shape; of all, by None, if all images are of one size."""
        buckets = self.buckets()
        if buckets is None:
            return {None: np.arange(len(self))}
        return {shape: buckets.members(number) for number, shape in enumerate(buckets.shapes)}

    def describe_as(self, samples: Samples) -> None:
        """Take over the attributes of another set with the same samples."""
        self.lengths, self.mixture = samples.lengths, samples.mixture
        self.fingerprint, self.dropped, self.selection = samples.fingerprint, samples.dropped, samples.selection

    def all_annotations(self) -> Batch:
        """Return the annotations of all samples, without augmentation."""
        return self.annotations(BatchIndices(np.arange(len(self))))

    def all_captions(self, reader: str) -> list[str]:
        """Return all captions of all samples; see :func:`captions_of`."""
        return captions_of(self.all_annotations(), reader)

    @property
    def captions_fingerprint(self) -> str:
        """Text that depends on all captions."""
        return self.fingerprint


class StoredImages(Samples):
    """Images in shards, decoded when drawn.

    Args:
        shards: source of the images.
        fit: resizing to the target size.
        background: colour behind transparency.
        random_crop: position the crop by the draw's jitter instead of in the centre.
        flip: mirror half of the draws, left to right.
        sizes: add the modalities that are computed from the crop; this reads the header of each image's file.
        captions: reading and choice of captions.
        workers: number of processes that decode.
        mixture: see :class:`Samples`.
        shapes: shapes of the aspect buckets; none if all images are of one size.
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
        captions: CaptionConfig = CaptionConfig(),  # noqa: B008 (frozen)
        workers: int = 0,
        mixture: Sequence[SourceShare] = (),
        shapes: Sequence[Shape] = (),
    ):
        self.shards, self.fit, self.background, self.workers = shards, fit, background, workers
        self.random_crop, self.flip, self.sizes, self.captions = random_crop, flip, sizes, captions
        self.lengths, self.dropped, self.mixture = shards.lengths, shards.dropped, mixture
        self.fingerprint = f"{shards.fingerprint}-{fit.height}x{fit.width}"
        if type(fit) is not Fit or background != WHITE:  # earlier versions had neither
            self.fingerprint += f"-{fit}-{background}"
        self.shapes = shapes
        if shapes:
            self.fingerprint += f"-{shapes}"
        self._bad: dict[int, BadSample] = {}  # those that were read already, in this process

    def buckets(self) -> Buckets | None:
        """Return the bucket of each sample, by the sizes in the index or else in the headers of the images."""
        return self._buckets

    @functools.cached_property
    def _buckets(self) -> Buckets | None:
        if not self.shapes:
            return None
        width, height = image_sizes(self.shards, self.original_size)
        known = width > 0  # a broken image has no size
        usual = nearest(self.shapes, np.array([self.fit.width]), np.array([self.fit.height]))
        of = np.full(len(self), usual, np.uint8)
        of[known] = nearest(self.shapes, width[known], height[known])
        return Buckets(self.shapes, of)

    def annotations(self, draw: BatchIndices) -> Batch:
        return self.with_captions(self.stored_annotations(draw), draw)

    def stored_annotations(self, draw: BatchIndices) -> Batch:
        """Return :meth:`annotations` with all captions of each sample, as :meth:`with_captions` takes them."""
        return self._load(draw, self._annotations)

    def all_captions(self, reader: str) -> list[str]:
        several = captions_of(self.stored_annotations(BatchIndices(np.arange(len(self)))), reader)
        return self.captions.in_templates([text for captions in several for text, _ in captions])

    @property
    def captions_fingerprint(self) -> str:
        """Text that depends on all captions, their format and templates."""
        parts = [self.fingerprint, *([self.captions.format] if self.captions.format != "text" else [])]
        return "-".join([*parts, *self.captions.templates])

    def with_captions(self, batch: Batch, draw: BatchIndices) -> Batch:
        """Replace the captions of each sample in the batch of a draw by the one that is used."""
        if CAPTION.key not in batch:
            return batch
        jitter = draw.without(batch.get(BAD, ())).jitter
        rows: Iterable[np.ndarray | None] = [None] * len(batch["key"]) if jitter is None else jitter
        texts = [self.captions.choose(each, row) for each, row in zip(batch[CAPTION.key], rows, strict=True)]
        return {**batch, CAPTION.key: texts}

    def spatial_annotations(self, draw: BatchIndices) -> Batch:
        return self._load(draw, self._spatial_annotations)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        self.shards.prepare(draw.index, draw.ahead)
        batch = self._load(draw, self._pixels, self._annotations, self._spatial_annotations)
        return self.with_captions(batch, draw)

    def image(self, i: int, shape: Shape | None = None) -> np.ndarray | BadSample:
        """Return image ``i`` as uint8 ``[h w 3]``, cropped in the centre, if its annotations for that crop can be read too."""
        (crop,) = self._crops(BatchIndices(np.array([i]), shape=shape))
        values = self._read(i, crop, [self._pixels, self._spatial_annotations])
        return values if isinstance(values, BadSample) else values["image"]

    def crops(self, i: int, places: np.ndarray) -> np.ndarray | BadSample:
        """Return several crops of image ``i``, uint8 ``[n h w 3]``, if its annotations can be read too.

        Args:
            i: number of the sample.
            places: ``[n 2]``, the position (y, x) of each crop in [0, 1]; the center if crops are not random.
        """
        images, buckets = [], self.buckets()
        shape = None if buckets is None else buckets.shapes[buckets.of[i]]
        draw = BatchIndices(np.full(len(places), i), np.c_[places, np.ones(len(places))], shape=shape)
        for crop in self._crops(draw):
            values = self._read(i, crop, [self._pixels, self._annotations, self._spatial_annotations])
            if isinstance(values, BadSample):
                return values
            images.append(values["image"])
        return np.stack(images)

    def members(self, i: int) -> dict[str, bytes]:
        """Return the annotations of sample ``i`` as stored, by suffix."""
        stored = {modality.suffix: self.shards.encoded(i, modality) for modality in self.shards.modalities.values()}
        return {suffix: data for suffix, data in stored.items() if suffix is not None}

    def mirrored(self, images: np.ndarray, draw: BatchIndices) -> np.ndarray:
        """Return the images ``[b h w ...]`` of a draw, mirrored where the draw requires it."""
        flips = self._flips(draw)
        return (
            np.where(flips.reshape(-1, *[1] * (images.ndim - 1)), images[:, :, ::-1], images) if self.flip else images
        )

    def _load(self, draw: BatchIndices, *readers: Reader) -> Batch:
        """Return the values that ``readers`` read of the samples of a draw, collated, and the samples that are ``bad``."""
        rows: list[dict[str, Any]] = []
        bad: dict[int, BadSample] = {}
        for row, (i, crop) in enumerate(zip(draw.index.tolist(), self._crops(draw), strict=True)):
            values = self._read(i, crop, readers)
            if isinstance(values, BadSample):
                bad[row] = values
            else:
                rows.append(values)
        batch: Batch = {BAD: bad} if bad else {}
        for key in rows[0] if rows else ():
            column = [row[key] for row in rows]
            if key == "image":
                batch[key] = to_tensor(np.stack(column))
            else:
                tensors = isinstance(column[0], Tensor)
                batch[key] = (
                    MODALITIES[key].collate(column) if key in MODALITIES else torch.stack(column) if tensors else column
                )
        return batch

    def _read(self, i: int, crop: Crop, readers: Sequence[Reader]) -> dict[str, Any] | BadSample:
        """Return what ``readers`` read of sample ``i``, or why it cannot be read."""
        values: dict[str, Any] = {}
        try:
            for reader in readers if i not in self._bad else ():
                values |= reader(i, crop)
        except SampleError as error:
            self._bad[i] = BadSample(error.reason, self.shards.keys[i], self.shards.path(i), str(error), i)
        return self._bad.get(i, values)

    def _pixels(self, i: int, crop: Crop) -> dict[str, Any]:
        # Twice the target size leaves enough pixels for Lanczos to average.
        enough = (2 * crop.fit.height, 2 * crop.fit.width)
        pixels = crop.fit(decode(self.shards.image(i), enough, self.background), crop.y, crop.x)
        return {"image": pixels[:, ::-1] if crop.flip else pixels}

    def _annotations(self, i: int, crop: Crop) -> dict[str, Any]:
        stored = [modality for modality in self.shards.modalities.values() if not modality.spatial]
        return {"key": self.shards.keys[i]} | {modality.key: self._value(i, modality) for modality in stored}

    def _spatial_annotations(self, i: int, crop: Crop) -> dict[str, Any]:
        stored = [modality for modality in self.shards.modalities.values() if modality.spatial]
        values = {modality.key: modality.crop(self._value(i, modality), crop) for modality in stored}
        for modality in MODALITIES.values() if self.sizes else ():
            if modality.from_crop is not None:
                values[modality.key] = modality.from_crop(crop)
        return values

    def _value(self, i: int, modality: Modality) -> Any:
        try:
            data = self.shards.encoded(i, modality)
            return self.captions.parse(data) if modality is CAPTION else modality.decode(data)
        except (StorageError, SampleError):
            raise
        except DataError as error:
            raise SampleError(Reason.MALFORMED_ANNOTATION, f"the {modality.noun} {error}") from None

    def fit_of(self, draw: BatchIndices) -> Fit:
        """Return how the images of a draw are resized."""
        return self.fit if draw.shape is None else replace(self.fit, height=draw.shape[0], width=draw.shape[1])

    def _crops(self, draw: BatchIndices) -> Iterator[Crop]:
        """Yield the crop of each sample of a draw."""
        fit = self.fit_of(draw)
        centre = np.full((len(draw.index), 2), 0.5)
        places = draw.jitter[:, :2] if draw.jitter is not None and self.random_crop else centre
        for i, (y, x), flip in zip(draw.index, places, self._flips(draw), strict=True):
            yield Crop(fit, y, x, flip, functools.partial(self.original_size, i))

    def _flips(self, draw: BatchIndices) -> np.ndarray:
        """Return ``[b]`` of bool: True for each mirrored image."""
        if draw.jitter is None or not self.flip:
            return np.zeros(len(draw.index), bool)
        return draw.jitter[:, 2] < 0.5

    def original_size(self, i: int) -> tuple[int, int]:
        """Return width and height of the stored image ``i`` in pixels.

        Raises:
            SampleError: the image is broken.
        """
        try:
            return image_size(self.shards.image(i))
        except StorageError:
            raise
        except DataError as error:
            raise SampleError(Reason.BROKEN_IMAGE, f"the image {error}") from None


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

    def annotations(self, draw: BatchIndices) -> Batch:
        return take(self._annotations, draw.index)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        return {"image": self._image[torch.from_numpy(draw.index)], **self.annotations(draw)}


def captions_of(batch: Mapping[str, Any], reader: str) -> list[Any]:
    """Return the captions of a batch, which ``reader`` needs.

    Raises:
        MissingCaptionsError: the data has none.
    """
    if "text" not in batch:
        raise MissingCaptionsError(f"{reader} needs captions, but the data has none; give each sample a .txt.")
    captions: list[Any] = batch["text"]
    return captions


def take(batch: Batch, index: np.ndarray) -> Batch:
    """Return the entries ``index`` of every tensor and list of a batch."""
    return {
        name: value[torch.from_numpy(index)] if isinstance(value, Tensor) else [value[i] for i in index]
        for name, value in batch.items()
    }
