"""Latent cache: the posterior of each image, encoded once into a file, for the denoiser to sample from.

The file is safetensors with one tensor ``posterior``, fp16 ``[n k z h w]``: the k tensors by which the first stage's class of
posteriors is cached (:attr:`ldm.vae.Posterior.cached`; of a Gaussian mean and standard deviation). It can be written and read
one image at a time whatever its size. Its metadata hold the fingerprints of the first stage and of the samples; if one of them
differs, the file is rewritten. The posterior of a bad sample is NaN; what is wrong with it is found by reading it again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.data.bad_samples import BAD, BadSample
from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.data.stream import batches_in_order, none_good
from ldm.errors import DataError
from ldm.formats.tensors import write_atomically
from ldm.vae import FirstStage

_TENSOR = "posterior"
_BATCH = 32  # images encoded at once


class CachedLatents(Samples):
    """Samples with the tensors ``names`` of their posteriors, fp32 ``[b z h w]`` channels_last, instead of ``image``.

    Args:
        samples: source of captions, keys and class numbers.
        path: file that :func:`cache_latents` wrote for it.
        names: names of the tensors in the file, in order: ``cached`` of the class of posteriors.
    """

    def __init__(self, samples: Samples, path: Path, names: Sequence[str]):
        self._samples, self._path, self._names = samples, path, names
        self.describe_as(samples)
        self._posteriors = safe_open(str(path), "pt").get_slice(_TENSOR)

    def annotations(self, draw: BatchIndices) -> Batch:
        return self._samples.annotations(draw)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        rows = torch.cat([self._posteriors[i : i + 1] for i in draw.index.tolist()]).float()
        missing = np.flatnonzero(rows.flatten(1)[:, 0].isnan().numpy()).tolist()
        if missing:
            bad = self._bad(BatchIndices(draw.index[missing]))
            rows, draw = rows[~np.isin(np.arange(len(rows)), missing)], draw.without(missing)
            return {**(self._batch(rows, draw) if len(draw) else {}), BAD: dict(zip(missing, bad, strict=True))}
        return self._batch(rows, draw)

    def _batch(self, rows: Tensor, draw: BatchIndices) -> Batch:
        parts = {name: rows[:, i].contiguous(memory_format=torch.channels_last) for i, name in enumerate(self._names)}
        unchanged = BatchIndices(draw.index)  # as the images were encoded
        return {**parts, **self.annotations(draw), **self._samples.spatial_annotations(unchanged)}

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
) -> CachedLatents:
    """Encode every sample, without augmentation, unless ``path`` already holds these latents.

    Args:
        first_stage: frozen, in evaluation mode; it is moved to ``device`` if it has to encode.
        fingerprint: fingerprint of its weights.
        samples: the images.
        path: ``run_dir/latents/<split>.safetensors``; written atomically.
        device: where to encode.
    """
    path = Path(path)
    metadata = {"first_stage": fingerprint, "samples": samples.fingerprint}
    if _metadata(path) != metadata:
        write_atomically(path, lambda temporary: _encode(first_stage, samples, temporary, metadata, device))
    return CachedLatents(samples, path, first_stage.posterior_type.cached)


def _metadata(path: Path) -> dict[str, str] | None:
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
    first_stage: FirstStage,
    samples: Samples,
    path: Path,
    metadata: dict[str, str],
    device: torch.device | str,
) -> None:
    from tqdm import tqdm

    first_stage.to(device)
    with (
        path.open("wb") as file,
        tqdm(total=len(samples), desc="encoding", unit="image", leave=False) as bar,
    ):
        bad: list[BadSample] = []
        skipped = 0  # bad samples before the first good one, which shows the shape of a posterior
        for batch in batches_in_order(samples, np.arange(len(samples)), _BATCH):
            failed = batch.pop(BAD, {})
            bad += failed.values()
            count = len(failed) + len(batch.get("key", ()))
            bar.update(count)
            if not batch and file.tell() == 0:
                skipped += count
                continue
            if batch:
                encoded = first_stage.encode(batch["image"].to(device)).to_cache().to("cpu", torch.float16)
            rows = torch.full((count, *encoded.shape[1:]), math.nan, dtype=torch.float16)
            rows[[row for row in range(count) if row not in failed]] = encoded[: len(batch.get("key", ()))]
            if file.tell() == 0:
                file.write(_header((len(samples), *encoded.shape[1:]), metadata))
                file.write(torch.full((skipped, *encoded.shape[1:]), math.nan, dtype=torch.float16).numpy().tobytes())
            file.write(rows.numpy().tobytes())
        if file.tell() == 0:
            raise none_good(bad)


def _header(shape: Sequence[int], metadata: dict[str, str]) -> bytes:
    """Return the bytes before the data of a safetensors file with one fp16 tensor: the length of a JSON header, and the header.

    Written here because the library writes only tensors that are in memory.
    """
    size = 2 * int(np.prod(shape, dtype=np.int64))
    entry = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, _TENSOR: entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
