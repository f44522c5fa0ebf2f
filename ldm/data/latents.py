"""Latent cache: the posterior of each image, encoded once into a file, for the denoiser to sample from.

The file is safetensors with one tensor ``posterior``, fp16 ``[n k z h w]``: the k tensors by which the first stage's class of
posteriors is cached (:attr:`ldm.vae.Posterior.cached`; of a Gaussian mean and standard deviation). It can be written and read
one image at a time whatever its size. Its metadata hold the fingerprints of the first stage and of the samples; if one of them
differs, the file is rewritten.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.data.stream import EvaluationLoader
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
        self.lengths, self.fingerprint = samples.lengths, samples.fingerprint
        self._posteriors = safe_open(str(path), "pt").get_slice(_TENSOR)

    def annotations(self, index: np.ndarray) -> Batch:
        return self._samples.annotations(index)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        rows = torch.cat([self._posteriors[i : i + 1] for i in draw.index.tolist()]).float()
        parts = {name: rows[:, i].contiguous(memory_format=torch.channels_last) for i, name in enumerate(self._names)}
        unchanged = BatchIndices(draw.index)  # as the images were encoded
        return {**parts, **self.annotations(draw.index), **self._samples.spatial_annotations(unchanged)}


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
        for batch in EvaluationLoader(samples, _BATCH):
            rows = first_stage.encode(batch["image"].to(device)).to_cache()
            stored = rows.to("cpu", torch.float16).contiguous().numpy()
            if file.tell() == 0:
                file.write(_header((len(samples), *stored.shape[1:]), metadata))
            file.write(stored.tobytes())
            bar.update(len(stored))


def _header(shape: Sequence[int], metadata: dict[str, str]) -> bytes:
    """Return the bytes before the data of a safetensors file with one fp16 tensor: the length of a JSON header, and the header.

    Written here because the library writes only tensors that are in memory.
    """
    size = 2 * int(np.prod(shape, dtype=np.int64))
    entry = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, _TENSOR: entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
