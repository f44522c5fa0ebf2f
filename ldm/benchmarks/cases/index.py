"""Opening an index of many samples and drawing the first batch, against reading it as one table with pyarrow."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ldm.benchmarks.case import Setup, register
from ldm.benchmarks.new_process import ProcessComparison, Program
from ldm.data.shard_index import IndexedShard, write_index
from ldm.formats.tensors import write_atomically

SAMPLES = 10_000_000

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

BUFFER = 10_000
"""Samples of the shuffle buffer in the cases that have one."""

OURS = Program(
    "from ldm.config import from_dict\nfrom ldm.data import ShardsData, TrainStream\nfrom ldm.data.filters import FilterConfig",
    """
filters = from_dict(FilterConfig, {filters})
data = ShardsData({path!r}, size=64, workers=0, shuffle_buffer={buffer}, filters=filters)
samples = data.open("train")
stream = TrainStream(samples, 64, 0, 10, shuffle_buffer=data.shuffle_buffer)
keys = [samples.shards.keys[i] for i in stream._order.draw(0, 64).index]
assert len(set(keys)) == 64
""",
)
THEIRS = Program(
    "import numpy as np, pyarrow.compute as pc, pyarrow.parquet as pq",
    """
members = [f"{{member}}.{{part}}" for member in ("image", "txt") for part in ("offset", "size")]
table = pq.read_table({path!r}, columns=["key", *members, *{columns}])
if {columns}:
    width, height, field = table["width"], table["height"], pc.field
    table = table.append_column("side", pc.min_element_wise(width, height))
    table = table.append_column("aspect", pc.divide(pc.cast(pc.max_element_wise(width, height), "float64"), table["side"]))
    table = table.filter(
        (field("side") >= 300) & (field("aspect") <= 3) & (field("caption_length") >= 30) & field("language").isin(["en", "de"])
        & (field("similarity") >= 0.1) & (field("pwatermark") <= 0.95) & (field("NSFW") != "NSFW")
    )
rows, buffer = np.random.default_rng(0).permutation(len(table)), {buffer}
if buffer:
    rows = np.random.default_rng(0).permutation(min(buffer, len(table)))
keys = table["key"].take(rows[:64]).to_pylist()
assert len(set(keys)) == 64
""",
)
COLUMNS = ["width", "height", "caption_length", "language", "similarity", "pwatermark", "NSFW"]
"""Columns that the filters need."""


def programs(setup: Setup, buffer: int | None, filters: dict[str, Any]) -> tuple[Program, Program]:
    """Return the programs that open the index and draw a batch of keys; the index is made if it does not exist."""
    samples = setup.options.get("samples") or (20_000 if setup.small else SAMPLES)
    path = setup.folder / f"synthetic-{samples}.parquet"
    if not path.is_file():  # in a process of its own, whose memory and libraries leave with it
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make_index, path, samples).result()
    values = {
        "path": str(path),
        "buffer": buffer,
        "filters": filters,
        "columns": json.dumps(COLUMNS if filters else []),
    }
    ours, theirs = (Program(side.preparation, side.work.format(**values)) for side in (OURS, THEIRS))
    return ours, theirs


def make_index(path: Path, samples: int) -> None:
    """Write an index of shards that do not exist, as LAION's sets have them: image, caption and JSON file of each sample."""
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


for _name, _title, _buffer, _filters in (
    ("index", "opening an index and drawing a batch", None, {}),
    ("index-buffer", "the same with a shuffle buffer", BUFFER, {}),
    ("index-filters", "the same with filters", None, FILTERS),
    ("index-filters-buffer", "the same with filters and a shuffle buffer", BUFFER, FILTERS),
):
    register(
        ProcessComparison(
            _name, _title, "pyarrow", partial(programs, buffer=_buffer, filters=_filters), packages=("pyarrow",)
        )
    )
