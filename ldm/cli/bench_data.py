"""Benchmarks of the data: start-up with an index of many samples, and a stream from an S3 server against a bare loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from ldm.errors import LdmError, missing_extra

SHARD = 1000
"""Samples of a shard of the synthetic index."""

FILTERS: dict[str, Any] = {
    "min_side": 300,
    "max_aspect_ratio": 3.0,
    "min_caption_length": 30,
    "languages": ["en", "de"],
    "fields": {"similarity": {"min": 0.1}, "pwatermark": {"max": 0.95}, "NSFW": {"none_of": ["NSFW"]}},
}
"""Filters of the samples of the synthetic index, of which they keep a part."""

START = """
import json, re, sys, time
start = time.perf_counter()
from pathlib import Path
from torch.utils.data import DataLoader
from ldm.data import ShardsData, TrainStream
def memory(pid, name): return int(re.search(name + r":\\s+(\\d+)", Path(f"/proc/{pid}/" + file).read_text())[1]) / 1e6
file = "status"
from ldm.config import from_dict
from ldm.data.filters import FilterConfig
buffer, filters = json.loads(sys.argv[2]), from_dict(FilterConfig, json.loads(sys.argv[3]))
data = ShardsData(sys.argv[1], size=64, workers=2, shuffle_buffer=buffer, filters=filters)
samples = data.open("train")
opened = time.perf_counter() - start
stream = TrainStream(samples, 64, 0, 10, shuffle_buffer=data.shuffle_buffer)
draw = stream._order.draw(0, 64)
keys = [samples.shards.keys[i] for i in draw.index]
print("measured", opened, time.perf_counter() - start, time.process_time(), memory("self", "VmHWM"), len(samples), flush=True)
class Keys:
    def __len__(self): return 10**9
    def __getitem__(self, i): return [samples.shards.keys[j] for j in stream._order.draw(64 * i, 64).index]
loader = iter(DataLoader(Keys(), batch_size=None, num_workers=2, collate_fn=list, shuffle=False))
for _ in range(20): next(loader)
file = "smaps_rollup"
pids = ["self", *(worker.pid for worker in loader._workers)]
print("shares", *(memory(pid, "Pss") for pid in pids), *(memory(pid, "Private_Dirty") for pid in pids))
"""
"""Script that opens an index and draws a batch, with its own workers at the end (Linux only)."""

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

STREAM_SIDE = 256
STREAM_SHARDS, STREAM_SAMPLES = 6, 500


def bench_index(folder: Path, samples: int) -> None:
    """Print seconds and memory of opening an index of that many samples, and of drawing a batch, in a new process.

    The index is created if it does not exist; the shards that it lists do not exist, since none is read.
    """
    path = folder / f"synthetic-{samples}.parquet"
    if not path.is_file():
        start = time.perf_counter()
        make_index(path, samples)
        print(
            f"made an index of {samples:,} samples, {path.stat().st_size / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s"
        )
    print(
        f"{'shuffle_buffer':>15}{'samples':>12}{'open':>8}{'first batch':>13}{'of CPU time':>13}{'peak':>10}"
        f"{'shares of rank and 2 workers':>30}"
    )
    for buffer, filters in ((None, {}), (10_000, {}), (None, FILTERS), (10_000, FILTERS)):
        done = subprocess.run(
            [sys.executable, "-c", START, str(path), json.dumps(buffer), json.dumps(filters)],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("measured", "shares"))]
        if len(lines) < 2:
            raise LdmError(
                f"the index could not be opened ({(done.stderr.strip().splitlines() or ['no message'])[-1]})."
            )
        opened, first, cpu, peak = (float(number) for number in lines[0][:4])
        shares = " + ".join(f"{float(number):.2f}" for number in lines[1][:3])
        count = int(lines[0][4])
        print(
            f"{buffer!s:>15}{count:12,}{opened:7.1f}s{first:12.1f}s{cpu:12.1f}s{peak:7.2f} GB{f'{shares} GB':>30}",
            flush=True,
        )


def make_index(path: Path, samples: int) -> None:
    """Write an index of shards that do not exist, as LAION's sets have them: image, caption and JSON file of each sample."""
    import numpy as np
    import pyarrow as pa

    from ldm.data.shard_index import IndexedShard, write_index
    from ldm.formats.tensors import write_atomically

    generator = np.random.default_rng(0)
    sizes = {"image": (10_000, 90_000), "txt": (20, 200), "json": (400, 900)}
    columns: dict[str, Any] = {"key": pa.array(np.char.zfill(np.arange(samples).astype("U10"), 10))}
    place = 512 + np.arange(samples, dtype=np.int64) % SHARD * 100_000
    for member, (low, high) in sizes.items():
        columns[f"{member}.offset"] = pa.array(place)
        columns[f"{member}.size"] = pa.array(generator.integers(low, high, samples).astype(np.int32))
        place = place + high
    for name, (low, high) in {"width": (256, 2048), "height": (256, 2048), "caption_length": (20, 200)}.items():
        columns[name] = pa.array(generator.integers(low, high, samples).astype(np.int32))
    columns |= {name: pa.array(generator.random(samples)) for name in ("similarity", "aesthetic", "pwatermark")}
    for name, values in {"language": ("en", "de", "fr"), "NSFW": ("UNLIKELY", "UNSURE", "NSFW")}.items():
        columns[name] = pa.array(np.array(values)[generator.integers(0, 3, samples)])
    shards = [
        IndexedShard(f"{i:08d}.tar", min(SHARD, samples - i * SHARD), SHARD * 100_000, f"{i:032x}", f"{i:032x}", None)
        for i in range(-(-samples // SHARD))
    ]
    table = pa.table(columns)
    write_atomically(
        path,
        lambda file: write_index(file, table, shards, fingerprint="synthetic", unique=True, folder="s3://none/shards"),
    )


def bench_stream(rounds: int, workers: int) -> None:
    """Print samples per second of a training stream from a local S3 server, and of a bare loop over the same shards.

    The bare loop reads each tar from its begin to its end and decodes with the same function, in one process; so does the stream
    without workers, which reads ahead while it decodes.
    """
    with tempfile.TemporaryDirectory() as temporary, s3_server() as address:
        names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(names | {"AWS_ENDPOINT_URL": address})
        url = _fill_bucket(Path(temporary))
        _stream(url, Path(temporary) / "warm", workers, count=64)
        found: dict[str, list[float]] = {"stream": [], "bare loop": []}
        for number in range(rounds):
            found["stream"].append(_stream(url, Path(temporary) / str(number), workers))
            found["bare loop"].append(_bare(url))
        for name, rates in found.items():
            print(f"{name:12}{median(rates):8.0f} samples/s ({', '.join(f'{rate:.0f}' for rate in rates)})")
        ratios = [a / b for a, b in zip(*found.values(), strict=True)]
        print(f"stream / bare loop: {median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3 server in a process of its own; yield its address."""
    try:
        import moto.server  # noqa: F401
    except ImportError:
        raise missing_extra("moto", "this benchmark", "dev") from None
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def _fill_bucket(folder: Path) -> str:
    import io

    import numpy as np
    from PIL import Image

    from ldm.data.indexing import make_index as index
    from ldm.data.shards import Sample, write_shard
    from ldm.data.storage import attempted, upload

    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(32):
        smooth = Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).resize((STREAM_SIDE, STREAM_SIDE))
        encoded = io.BytesIO()
        smooth.save(encoded, "JPEG", quality=90)
        pictures.append(encoded.getvalue())
    attempted("s3://bench", lambda fs, path: fs.mkdir(path), "created")
    for shard in range(STREAM_SHARDS):
        samples = (
            Sample(f"{shard:03d}{i:05d}", f"caption {i}", pictures[i % len(pictures)], "jpg")
            for i in range(STREAM_SAMPLES)
        )
        write_shard(folder / "shards" / f"{shard:03d}.tar", samples)
        upload(folder / "shards" / f"{shard:03d}.tar", f"s3://bench/{shard:03d}.tar")
    index("s3://bench", workers=1)
    return "s3://bench"


def _stream(url: str, cache: Path, workers: int, count: int = STREAM_SHARDS * STREAM_SAMPLES) -> float:
    """Return samples per second of an epoch, with an empty cache."""
    from ldm.data import ShardsData, TrainStream
    from ldm.data.shard_cache import ShardCacheConfig

    data = ShardsData(
        url, size=64, workers=workers, shuffle_buffer=STREAM_SAMPLES, shard_cache=ShardCacheConfig(str(cache), 1)
    )
    stream = TrainStream(data.open("train"), 50, 0, count // 50, shuffle_buffer=data.shuffle_buffer)
    start = time.perf_counter()
    seen = sum(len(batch["key"]) for batch in stream)
    return seen / (time.perf_counter() - start)


def _bare(url: str) -> float:
    """Return samples per second of reading each tar in sequence and decoding its images into batches."""
    import tarfile

    import numpy as np

    from ldm.data.storage import attempted
    from ldm.data.transforms import decode, to_tensor
    from ldm.modalities.crop import FITS

    fit, seen = FITS["crop"](64, 64, (255, 255, 255)), 0
    start = time.perf_counter()
    for shard in range(STREAM_SHARDS):
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
                    seen += 1
                if len(pixels) == 50:
                    to_tensor(np.stack(pixels))
                    pixels = []
    return seen / (time.perf_counter() - start)
