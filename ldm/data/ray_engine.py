"""Encoding as a Ray Data pipeline: tasks that decode, on all CPUs of a cluster, and actors that encode, with a GPU each.

The functions and the batches are those of :func:`ldm.data.encoding.local_engine`; the process that calls writes the shards.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ldm.data.bad_samples import BadSample
from ldm.data.encoding import EncodedSample, Encoder, Engine, decode
from ldm.data.samples import StoredImages
from ldm.errors import LdmError, missing_extra


def ray_engine(images: StoredImages, encoder: Encoder, crops: int, actors: int) -> Engine:
    """Return the engine that encodes on a Ray cluster: the one that is connected, that of ``RAY_ADDRESS``, or a local one.

    Args:
        images: the images; all machines of the cluster must be able to read their shards.
        encoder: the encoder; if its device is a GPU, each actor takes one.
        crops: number of crops of each image.
        actors: number of actors that encode.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    try:
        import ray.data
        import ray.exceptions
    except ImportError:
        raise missing_extra("ray", "--engine ray", "ray") from None
    kind, size = encoder.device.type, encoder.config.batch_size

    def encoded(index: np.ndarray) -> Iterator[Sequence[EncodedSample | BadSample]]:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        count = -(-len(index) // size)
        shared = ray.put((images, index, crops, size))
        rows = (
            ray.data.range(count, override_num_blocks=count)
            .map(_Decode(shared))
            .map(
                _Encode,  # type: ignore[arg-type]  # Ray declares functions alone, but makes an actor of a class
                fn_constructor_args=(ray.put(encoder.to("cpu")), kind),
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=0,  # so that decoding always finds a CPU, and is not made part of the actors
                num_gpus=int(kind == "cuda"),
            )
        )
        try:
            for number, row in enumerate(rows.iter_rows()):
                assert row["id"] == number, "the batches are out of order"
                yield pickle.loads(row["samples"])
        except ray.exceptions.RayError as error:
            raise _user_error(error) or error from None

    return encoded


class _Decode:
    """Function of a row ``id``, the number of a batch, that adds its decoded samples."""

    def __init__(self, shared: Any):
        self.shared = shared

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        images, index, crops, size = ray.get(self.shared)
        part = index[row["id"] * size : (row["id"] + 1) * size]
        return {"id": row["id"], "samples": pickle.dumps(decode(images, part, crops))}


class _Encode:
    """Actor that encodes the samples of rows."""

    def __init__(self, encoder: Any, device: str):
        import ray

        self.encoder = ray.get(encoder).to(device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        samples = self.encoder(pickle.loads(row["samples"]))
        return {"id": row["id"], "samples": pickle.dumps(samples)}


def _user_error(error: BaseException) -> LdmError | None:
    """Return the error of ldm that a task or an actor has raised; None if it is another one."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, LdmError):
        found = getattr(found, "cause", None) or found.__cause__
    return found
