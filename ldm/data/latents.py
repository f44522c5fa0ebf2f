"""Latent cache: the posterior of each image, encoded once into a file, for the denoiser to sample from.

The file is safetensors with one tensor ``posterior``, fp16 ``[n k z h w]``: the k tensors by which the first stage's class of
posteriors is cached (:attr:`ldm.vae.Posterior.cached`; of a Gaussian mean and standard deviation). Of images in aspect buckets
it has one tensor for each bucket, ``posterior.<height>x<width>``. It can be written and read one image at a time whatever its
size. Its metadata hold the fingerprints of the first stage and of the samples; if one of them
differs, the file is rewritten. The posterior of a bad sample is NaN; what is wrong with it is found by reading it again.

Features of the images that a loss compares the denoiser with are cached likewise, in a file of their own with a tensor
``teacher``, ``[n z h w]``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.data.bad_samples import BAD, BadSample
from ldm.data.buckets import Buckets, Shape
from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.data.stream import batches_in_order, none_good
from ldm.data.teacher import TEACHER, Teacher
from ldm.errors import DataError
from ldm.formats.tensors import write_atomically
from ldm.vae import FirstStage

_POSTERIOR = "posterior"
_BATCH = 32  # images encoded at once

Metadata = dict[str, str]
"""Fingerprints of the network and of the samples of a file."""


class _Rows:
    """Tensors ``name`` of samples in a file, one for each bucket, in the order of the samples."""

    def __init__(self, samples: Samples, path: Path, name: str):
        self._tensors, self._row_of = {}, np.empty(len(samples), np.int64)
        file = safe_open(str(path), "pt")
        for shape, numbers in samples.by_shape().items():
            self._tensors[shape] = file.get_slice(_name(name, shape))
            self._row_of[numbers] = np.arange(len(numbers))

    def __contains__(self, shape: Shape | None) -> bool:
        return shape in self._tensors

    def __getitem__(self, draw: BatchIndices) -> Tensor:
        """Return the rows of a draw in fp32, ``[b ...]``."""
        tensor = self._tensors[draw.shape]
        return torch.cat([tensor[i : i + 1] for i in self._row_of[draw.index].tolist()]).float()


class CachedLatents(Samples):
    """Samples with the tensors ``names`` of their posteriors, fp32 ``[b z h w]`` channels_last, in place of or with ``image``.

    Args:
        samples: source of captions, keys and class numbers.
        path: file that :func:`cache_latents` wrote for it.
        names: names of the tensors in the file, in order: ``cached`` of the class of posteriors.
        with_images: True to give the images as they were encoded as well.
        teacher: file of their features, which are given as well; None for none.
    """

    def __init__(
        self,
        samples: Samples,
        path: Path,
        names: Sequence[str],
        with_images: bool = False,
        teacher: Path | None = None,
    ):
        self._samples, self._path, self._names, self._with_images = samples, path, names, with_images
        self.describe_as(samples)
        self._posteriors = _Rows(samples, path, _POSTERIOR)
        self._features = None if teacher is None else _Rows(samples, teacher, TEACHER)

    def buckets(self) -> Buckets | None:
        return self._samples.buckets()

    def annotations(self, draw: BatchIndices) -> Batch:
        return self._samples.annotations(draw)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        """Return the latents of a draw; images if they are not to have the shape of their buckets, as in previews."""
        if draw.shape not in self._posteriors:
            return self._samples[draw]
        self._check_shape(draw)
        rows = self._posteriors[draw]
        missing = np.flatnonzero(rows.flatten(1)[:, 0].isnan().numpy()).tolist()
        if missing:
            bad = self._bad(BatchIndices(draw.index[missing], shape=draw.shape))
            rows, draw = rows[~np.isin(np.arange(len(rows)), missing)], draw.without(missing)
            return {**(self._batch(rows, draw) if len(draw) else {}), BAD: dict(zip(missing, bad, strict=True))}
        return self._batch(rows, draw)

    def _batch(self, rows: Tensor, draw: BatchIndices) -> Batch:
        parts = {name: rows[:, i].contiguous(memory_format=torch.channels_last) for i, name in enumerate(self._names)}
        unchanged = BatchIndices(draw.index, shape=draw.shape)  # as the images were encoded
        images = {"image": self._samples[unchanged]["image"]} if self._with_images else {}
        teacher = {} if self._features is None else {TEACHER: self._features[draw]}
        return {**parts, **images, **teacher, **self.annotations(draw), **self._samples.spatial_annotations(unchanged)}

    def _check_shape(self, draw: BatchIndices) -> None:
        """Raise a DataError if a sample is of another bucket, which replaces those of a bucket that are all bad."""
        buckets = self.buckets()
        if buckets is not None and draw.shape is not None:
            number = buckets.shapes.index(draw.shape)
            if (buckets.of[draw.index] != number).any():
                height, width = draw.shape
                raise DataError(
                    f"none of the {len(buckets.members(number))} images of the bucket {height} x {width} can be used, and "
                    "latents of other shapes are not cached; remove them, or set data.cache_latents to false."
                )

    def _bad(self, draw: BatchIndices) -> list[BadSample]:
        """Return what is wrong with the samples of a draw, none of which has latents.

        Raises:
            DataError: one of them can be read.
        """
        batch = self._samples[draw]
        if batch.keys() - {BAD}:
            raise DataError(
                f"the latent of {batch['key'][0]!r} in {self._path} is not finite; delete the file to encode the images again."
            )
        bad: dict[int, BadSample] = batch[BAD]
        return list(bad.values())


def cache_latents(
    first_stage: FirstStage,
    fingerprint: str,
    samples: Samples,
    path: str | Path,
    device: torch.device | str = "cpu",
    with_images: bool = False,
    teacher: Teacher | None = None,
) -> CachedLatents:
    """Encode every sample, without augmentation, unless ``path`` already holds these latents.

    Args:
        first_stage: frozen, in evaluation mode; it is moved to ``device`` if it has to encode.
        fingerprint: fingerprint of its weights.
        samples: the images.
        path: ``run_dir/latents/<split>.safetensors``; written atomically.
        device: where to encode.
        with_images: True to give the images with their latents.
        teacher: features of the images to cache and give as well, in ``<split>-teacher.safetensors``.
    """
    path = Path(path)

    def posterior(image: Tensor) -> Tensor:
        return first_stage.encode(image).to_cache()

    def shape_in(encoded: Sequence[int], shape: Shape) -> Sequence[int]:
        return (*encoded[:2], *(side // first_stage.factor for side in shape))

    metadata = {"first_stage": fingerprint, "samples": samples.fingerprint}
    if _metadata(path) != metadata:
        first_stage.to(device)  # not in inference mode, in which moved parameters could not be used in training
        write_atomically(path, lambda file: _encode(_POSTERIOR, posterior, shape_in, samples, file, metadata, device))
    features = (
        None if teacher is None else _cache_features(teacher, samples, path.with_stem(f"{path.stem}-teacher"), device)
    )
    return CachedLatents(samples, path, first_stage.posterior_type.cached, with_images, features)


def _cache_features(teacher: Teacher, samples: Samples, path: Path, device: torch.device | str) -> Path:
    """Write the features of every sample, unless ``path`` already holds them, and return the path."""

    def shape_in(features: Sequence[int], shape: Shape) -> Sequence[int]:
        return features  # of images that are resized to one size

    metadata = {"teacher": teacher.fingerprint, "samples": samples.fingerprint}
    if _metadata(path) != metadata:
        teacher.network.to(device)  # as the first stage
        write_atomically(path, lambda file: _encode(TEACHER, teacher.encode, shape_in, samples, file, metadata, device))
    return path


def _metadata(path: Path) -> Metadata | None:
    """Return the metadata of a file of latents; None if it does not exist or is incomplete."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata()
    except SafetensorError:
        return None


@torch.inference_mode()
def _encode(
    name: str,
    encode: Callable[[Tensor], Tensor],
    shape_in: Callable[[Sequence[int], Shape], Sequence[int]],
    samples: Samples,
    path: Path,
    metadata: Metadata,
    device: torch.device | str,
) -> None:
    """Write the tensor ``name`` of each sample; ``shape_in`` returns its shape in a bucket, given that in any other bucket."""
    from tqdm import tqdm

    groups = samples.by_shape()
    with (
        path.open("wb") as file,
        tqdm(total=len(samples), desc="encoding", unit="image", leave=False) as bar,
    ):
        bad: list[BadSample] = []
        skipped: list[tuple[Shape | None, int]] = []  # bad samples before the first good one
        shapes: dict[Shape | None, Sequence[int]] = {}  # of what is made in each bucket, as the first good one shows
        for shape, numbers in groups.items():
            for batch in batches_in_order(samples, numbers, _BATCH, shape):
                failed = batch.pop(BAD, {})
                bad += failed.values()
                count = len(failed) + len(batch.get("key", ()))
                bar.update(count)
                if not batch and not shapes:
                    skipped.append((shape, count))
                    continue
                if batch:
                    encoded = encode(batch["image"].to(device)).to("cpu", torch.float16)
                if not shapes:
                    own = encoded.shape[1:]
                    shapes = {each: own if each is None else shape_in(own, each) for each in groups}
                    sizes = {_name(name, each): (len(groups[each]), *shapes[each]) for each in groups}
                    file.write(_header(sizes, metadata))
                    for each, missing in skipped:
                        file.write(_missing(missing, shapes[each]).numpy().tobytes())
                rows = _missing(count, shapes[shape])
                if batch:
                    rows[[row for row in range(count) if row not in failed]] = encoded
                file.write(rows.numpy().tobytes())
        if not shapes:
            raise none_good(bad)


def _name(name: str, shape: Shape | None) -> str:
    """Return the name of the tensor of a bucket."""
    return name if shape is None else f"{name}.{shape[0]}x{shape[1]}"


def _missing(count: int, shape: Sequence[int]) -> Tensor:
    """Return the rows of ``count`` bad samples."""
    return torch.full((count, *shape), math.nan, dtype=torch.float16)


def _header(tensors: Mapping[str, Sequence[int]], metadata: Metadata) -> bytes:
    """Return the bytes before the data of a safetensors file with fp16 tensors: the length of a JSON header, and the header.

    Written here because the library writes only tensors that are in memory.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
