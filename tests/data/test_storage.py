"""Shards on real servers: S3 by moto, HTTP by Python's file server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.data import ShardsData, storage
from ldm.data.buckets import BucketConfig
from ldm.data.filters import FilterConfig
from ldm.data.indexing import make_index
from ldm.data.mixture import WeightedSource
from ldm.data.parquet_images import prepare_parquet
from ldm.data.samples import Batch
from ldm.data.shard_cache import ShardCacheConfig
from ldm.data.shards import Shards
from ldm.data.stream import EvaluationLoader, TrainStream
from ldm.errors import DataError, StorageError
from tests.data.pictures import encoded, noise_picture, write_shards
from tests.data.servers import WebServer, s3_bucket, web_server


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "DELAYS", (0.01,) * 4)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture
def http(tmp_path: Path) -> Iterator[WebServer]:
    with web_server(tmp_path) as server:
        yield server


@pytest.fixture
def local(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [5, 4, 6], labelled=True)
    return tmp_path / "shards"


def put(folder: Path, url: str) -> str:
    for path in sorted(folder.iterdir()):
        storage.upload(path, f"{url}/{path.name}")
    return url


def batches(source: Any, workers: int = 0, rank: int = 0, start: int = 0) -> list[Batch]:
    """Batches that are read by ranges, since the cache cannot hold the shards."""
    cache = ShardCacheConfig("/dev/null", 1e-6)
    data = ShardsData(source, size=(8, 6), workers=workers, flip=True, crop="random", shard_cache=cache)
    return list(TrainStream(data.open("train"), 4, 3, 6, start_batch=start, shuffle_buffer=4, rank=rank, world_size=2))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    assert_same_images(found, expected)


def assert_same_images(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch["text"] for batch in found] == [batch["text"] for batch in expected]
    assert all((a["image"] == b["image"]).all() for a, b in zip(found, expected, strict=True))


def test_a_bucket_gives_the_batches_of_the_disk(s3: str, local: Path) -> None:
    expected = [batches(str(local), rank=rank) for rank in range(2)]
    fingerprint = Shards.open(str(local), "train").fingerprint
    make_index(str(local))
    url = put(local, f"{s3}/copied")
    assert Shards.open(url, "train").fingerprint == fingerprint
    for rank in range(2):
        assert_same(batches(url, rank=rank), expected[rank])
    assert_same(batches(url, workers=2, rank=1, start=2), expected[1][2:])


def test_sources_in_a_bucket(s3: str, local: Path) -> None:
    url = put(local, f"{s3}/sources")
    with pytest.raises(DataError, match=r"s3://data/sources has no index\.parquet, by which remote shards are read"):
        Shards.open(url, "train")
    index = make_index(url, workers=2)
    assert [shard.samples for shard in index.shards] == [5, 4, 6]
    for source, lengths in {
        url: [5, 4, 6],
        f"{url}/*.tar": [5, 4, 6],
        f"{url}/{{000..001}}.tar": [5, 4],
        f"{url}/00[02].tar": [5, 6],
        f"{url}/002.tar": [6],
        f"{url}/index.parquet": [5, 4, 6],
    }.items():
        shards = Shards.open(source, "train")
        assert shards.lengths == lengths
        assert shards.text(0) == ("caption 9" if lengths == [6] else "caption 0")
        assert len(shards.column("width")) == sum(lengths)
    with pytest.raises(DataError, match=r"no shard matches s3://data/sources/none-\*\.tar"):
        Shards.open(f"{url}/none-*.tar", "train")
    with pytest.raises(DataError, match=r"does not list the shard s3://data/sources/009\.tar"):
        Shards.open(f"{url}/009.tar", "train")


def test_a_web_server_gives_the_batches_of_the_disk(http: WebServer, local: Path, tmp_path: Path) -> None:
    expected = batches(str(local))
    url = f"{http.url}/shards"
    with pytest.raises(DataError, match=r"cannot be listed; give a pattern such as \.\.\./"):
        make_index(url)
    with pytest.raises(DataError, match=r"nothing can be written to .*give a local file with --out"):
        make_index(f"{url}/{{000..002}}.tar")
    make_index(f"{url}/{{000..002}}.tar", str(tmp_path / "web.parquet"), workers=1)
    assert_same(batches(str(tmp_path / "web.parquet")), expected)
    make_index(str(local))
    assert_same(batches(url), expected)


@pytest.mark.parametrize("ending", ["index.parquet", "001.tar"])
def test_answers_of_503_are_repeated(http: WebServer, local: Path, ending: str) -> None:
    make_index(str(local))
    expected = batches(str(local))
    http.fail(ending, 3)
    assert_same(batches(f"{http.url}/shards"), expected)
    assert http.failures(ending) == 0


def test_a_server_that_stays_away_is_one_sentence(http: WebServer, local: Path) -> None:
    make_index(str(local))
    shards = Shards.open(f"{http.url}/shards", "train")
    http.fail("000.tar", 99)
    with pytest.raises(
        StorageError, match=r"000\.tar cannot be read \(.*503.*\), also after 4 further attempts"
    ) as error:
        shards.image(0)
    assert "\n" not in str(error.value)
    assert 99 - http.failures("000.tar") == 5


def test_shards_that_vanish_or_change_are_one_sentence(http: WebServer, local: Path) -> None:
    make_index(str(local))
    shards = Shards.open(f"{http.url}/shards", "train")
    (local / "000.tar").write_bytes((local / "000.tar").read_bytes()[:600])
    with pytest.raises(StorageError, match=r"of the shard .*000\.tar were received instead of"):
        shards.image(0)
    os.remove(local / "000.tar")  # noqa: PTH107
    before = len(http.requests())
    with pytest.raises(StorageError, match=r"000\.tar does not exist"):
        shards.image(0)
    assert len(http.requests()) == before + 1


def test_filters_read_the_index_alone(http: WebServer, local: Path) -> None:
    make_index(str(local))
    data = ShardsData(f"{http.url}/shards", size=8, workers=0, filters=FilterConfig(min_side=12, max_caption_length=9))
    http.fail("index.parquet", 2)
    samples = data.open("train")
    keys = [f"{i:04d}" for i in range(15) if 10 + i % 5 >= 12 and i < 10]  # of 10 to 14 x 12 pixels
    assert list(samples.shards.keys) == keys  # type: ignore[attr-defined]
    assert not [request for request in http.requests() if ".tar" in request]
    (batch,) = EvaluationLoader(samples, 100)
    assert batch["key"] == keys


def test_a_bucket_and_a_disk_without_an_index_are_mixed_filtered_and_read_in_buckets(
    s3: str, local: Path, tmp_path: Path
) -> None:
    write_shards(tmp_path / "own", [6, 3], labelled=True)
    settings: Any = {
        "size": 12,
        "workers": 0,
        "buckets": BucketConfig(1),
        "shuffle_buffer": 6,
        "shard_cache": ShardCacheConfig(str(tmp_path / "cache")),
        "filters": FilterConfig(min_side=11),
    }

    def mixed(source: str, folder: Path = tmp_path) -> list[Batch]:
        mixture = (WeightedSource(source, 2), WeightedSource(str(folder / "own")))
        samples = ShardsData(mixture=mixture, **settings).open("train")
        fingerprints.append(samples.fingerprint)
        return list(TrainStream(samples, 3, 0, 12, shuffle_buffer=6))

    fingerprints: list[str] = []
    make_index(str(local))
    expected = mixed(str(local))
    assert {batch["image"].shape[2:] for batch in expected} > {(12, 12)}
    url = put(local, f"{s3}/mixed")
    assert_same_images(mixed(url), expected)
    shutil.copytree(tmp_path / "own", tmp_path / "elsewhere" / "own")
    mixed(url, tmp_path / "elsewhere")
    write_shards(tmp_path / "own", [5, 4], labelled=True)
    mixed(url)
    assert fingerprints[1] == fingerprints[2] != fingerprints[3]


def test_parquet_files_are_read_from_servers(s3: str, http: WebServer, tmp_path: Path) -> None:
    images = [encoded(noise_picture(i)) for i in range(3)]
    for split in ("train", "validation"):
        table = pa.table({"image": [{"bytes": each, "path": None} for each in images], "text": ["a", "b", "c"]})
        pq.write_table(table, tmp_path / f"{split}-0.parquet")
        storage.upload(tmp_path / f"{split}-0.parquet", f"{s3}/parquet/{split}/0.parquet")
    urls = [f"{http.url}/{{train,validation}}-0.parquet"], [f"{s3}/parquet"], [f"{s3}/parquet/*/0.parquet"]
    http.fail("train-0.parquet", 3)
    for number, sources in enumerate(urls):
        report = prepare_parquet(sources, tmp_path / str(number))
        assert report.images == {"train": 3, "val": 3, "test": 0}
        shards = Shards.open(str(tmp_path / str(number) / "val"), "val")
        assert [shards.image(i) for i in range(3)] == images
    with pytest.raises(DataError, match=r"no parquet file in s3://data/none; give files"):
        prepare_parquet([f"{s3}/none"], tmp_path / "none")
    with pytest.raises(StorageError, match=r"none\.parquet does not exist"):
        prepare_parquet([f"{http.url}/none.parquet"], tmp_path / "none")


def test_a_password_in_an_address_is_not_shown() -> None:
    assert storage.shown("https://me:secret@host/a/b.tar?signature=1") == "https://host/a/b.tar"
    assert storage.joined("https://host/a?signature=1", "b.tar") == "https://host/a/b.tar?signature=1"


def cached(url: str, folder: Path, gib: float = 1.0, workers: int = 0, buffer: int | None = 4) -> TrainStream:
    cache = ShardCacheConfig(str(folder), gib)
    data = ShardsData(
        url, size=(8, 6), workers=workers, flip=True, crop="random", shard_cache=cache, shuffle_buffer=buffer
    )
    return TrainStream(data.open("train"), 4, 3, 12, shuffle_buffer=buffer)


def test_a_cache_gives_the_same_batches_and_reads_each_shard_once(http: WebServer, local: Path, tmp_path: Path) -> None:
    expected = list(cached(str(local), tmp_path / "unused"))
    make_index(str(local))
    url = f"{http.url}/shards"
    http.fail("001.tar", 3)
    for workers in (2, 0):
        assert_same(list(cached(url, tmp_path / "cache", workers=workers)), expected)
    assert sorted(path for path in http.requests() if path.endswith(".tar")) == [
        "/shards/000.tar",
        *["/shards/001.tar"] * 4,
        "/shards/002.tar",
    ]
    assert not (tmp_path / "unused").exists()
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert sorted(Path(name).suffix for name in names) == [".lock"] * 4 + [".tar"] * 3


def test_a_small_cache_keeps_its_size(http: WebServer, local: Path, tmp_path: Path) -> None:
    expected = list(cached(str(local), tmp_path / "unused"))
    make_index(str(local))
    sizes = [path.stat().st_size for path in local.glob("*.tar")]
    for i, batch in enumerate(cached(f"{http.url}/shards", tmp_path / "cache", 2 * max(sizes) / 2**30)):
        assert_same([batch], expected[i : i + 1])
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 2 * max(sizes)


def test_a_shard_larger_than_the_cache_is_one_sentence(http: WebServer, local: Path, tmp_path: Path) -> None:
    make_index(str(local))
    with pytest.raises(StorageError, match=r"more than the cache .* may hold; enlarge data\.shard_cache\.size"):
        list(cached(f"{http.url}/shards", tmp_path / "cache", 1e-6))


def test_a_cache_that_cannot_be_written_is_one_sentence(http: WebServer, local: Path, tmp_path: Path) -> None:
    make_index(str(local))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"the shard cache .*cache cannot be used \("):
        list(cached(f"{http.url}/shards", tmp_path / "cache"))


@pytest.mark.parametrize("same_size", [True, False])
def test_a_remote_shard_that_is_not_that_of_the_index_is_refused(
    http: WebServer, local: Path, tmp_path: Path, same_size: bool
) -> None:
    make_index(str(local))
    for path in local.glob("*.tar"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"caption", b"CAPTION") if same_size else data[:-100])
    with pytest.raises(StorageError, match="not the one that its index lists" if same_size else "bytes instead of"):
        list(cached(f"{http.url}/shards", tmp_path / "cache"))


def test_a_set_that_exceeds_the_cache_is_read_by_ranges_in_a_random_order(
    http: WebServer, local: Path, tmp_path: Path
) -> None:
    expected = list(cached(str(local), tmp_path / "unused", buffer=None))
    make_index(str(local))
    assert_same(list(cached(f"{http.url}/shards", tmp_path / "cache", 1e-6, buffer=None)), expected)
    assert not (tmp_path / "cache").exists()
    assert_same(list(cached(f"{http.url}/shards", tmp_path / "cache", 1.0, buffer=None)), expected)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
