"""A training stream from a local S3 server, against a bare loop that reads each tar in sequence and decodes its images."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.benchmarks.case import Case, Setup, register
from ldm.benchmarks.compare import alternate
from ldm.benchmarks.peaks import Peaks
from ldm.benchmarks.result import Result, Side
from ldm.benchmarks.s3_server import s3_server

IMAGE_SIDE = 256
SHARDS = 6


class Stream(Case):
    """One epoch of both. The bare loop decodes with the same function in one process, and so does the stream without workers."""

    name = "stream"
    title = "an epoch of shards on a local S3 server"
    peer = "tarfile and s3fs"

    def measure(self, setup: Setup, peaks: Peaks | None) -> Result:
        samples, workers, numbers = 50 if setup.small else 500, setup.options.get("workers", 0), count()
        with tempfile.TemporaryDirectory() as temporary, s3_server() as address:
            names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
            os.environ.update(names | {"AWS_ENDPOINT_URL": address})
            url = _fill_bucket(Path(temporary), samples)
            ours, theirs = alternate(
                lambda: _stream(url, Path(temporary) / str(next(numbers)), workers, samples), lambda: _bare(url), setup
            )
        rate = SHARDS * samples / Side(ours).median
        return Result(
            self.name,
            self.title,
            self.peer,
            Side(ours),
            Side(theirs),
            values=(("samples_per_second", rate), ("workers", workers)),
        )


def _fill_bucket(folder: Path, samples: int) -> str:
    from ldm.data.indexing import make_index
    from ldm.data.shards import Sample, write_shard
    from ldm.data.storage import attempted, upload

    generator = np.random.default_rng(0)
    images = []
    for _ in range(32):
        smooth = Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).resize((IMAGE_SIDE, IMAGE_SIDE))
        encoded = io.BytesIO()
        smooth.save(encoded, "JPEG", quality=90)
        images.append(encoded.getvalue())
    attempted("s3://bench", lambda fs, path: fs.mkdir(path), "created")
    for shard in range(SHARDS):
        contents = (
            Sample(f"{shard:03d}{i:05d}", f"caption {i}", images[i % len(images)], "jpg") for i in range(samples)
        )
        write_shard(folder / "shards" / f"{shard:03d}.tar", contents)
        upload(folder / "shards" / f"{shard:03d}.tar", f"s3://bench/{shard:03d}.tar")
    make_index("s3://bench", workers=1)
    return "s3://bench"


def _stream(url: str, cache: Path, workers: int, samples: int) -> None:
    """Read an epoch with an empty cache."""
    from ldm.data import ShardsData, TrainStream
    from ldm.data.shard_cache import ShardCacheConfig

    data = ShardsData(
        url, size=64, workers=workers, shuffle_buffer=samples, shard_cache=ShardCacheConfig(str(cache), 1)
    )
    batches = SHARDS * samples // 50
    stream = TrainStream(data.open("train"), 50, 0, batches, shuffle_buffer=data.shuffle_buffer)
    assert sum(len(batch["key"]) for batch in stream) == 50 * batches


def _bare(url: str) -> None:
    """Read each tar in sequence and decode its images into batches."""
    from ldm.data.storage import attempted
    from ldm.data.transforms import decode, to_tensor
    from ldm.modalities.crop import FITS

    fit = FITS["crop"](64, 64, (255, 255, 255))
    for shard in range(SHARDS):
        pixels: list[Any] = []
        with (
            attempted(f"{url}/{shard:03d}.tar", lambda fs, path: fs.open(path, "rb", block_size=16 << 20)) as file,
            tarfile.open(fileobj=file, mode="r|") as tar,
        ):
            for member in tar:
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
                if member.name.endswith(".jpg"):
                    pixels.append(fit(decode(data, (128, 128)), 0.5, 0.5))
                if len(pixels) == 50:
                    to_tensor(np.stack(pixels))
                    pixels = []


register(Stream())
