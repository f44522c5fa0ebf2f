from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data import ShardsData
from ldm.data.indexing import IndexOptions, make_index
from ldm.data.shard_format import ShardContent, scan_shard
from ldm.data.shard_index import ShardIndex
from ldm.data.shards import EMOJI, Shards, find_shards
from ldm.data.stream import TrainStream
from ldm.errors import DataError
from ldm.modalities.label import LABEL
from tests.data.pictures import encoded, noise_picture, write_shards, write_tar

INDEX = "index.parquet"
PICTURE = encoded(noise_picture(0, height=5, width=7))


def everything(shards: Shards) -> dict[str, Any]:
    return {
        "keys": list(shards.keys),
        "lengths": shards.lengths,
        "images": [shards.image(i) for i in range(len(shards))],
        "values": {
            key: [shards.encoded(i, modality) for i in range(len(shards))]
            for key, modality in shards.modalities.items()
        },
        "fingerprint": shards.fingerprint,
    }


keys = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="./\\"), min_size=1, max_size=40)
suffixes = st.sampled_from(["png", "jpg", "txt", "cls", "json", "unknown"])
members = st.lists(st.tuples(keys, suffixes, st.binary(max_size=600)), max_size=8)


@given(st.lists(members, min_size=1, max_size=3))
def test_an_index_gives_what_the_headers_give(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[tuple[str, str, bytes]]]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    for number, content in enumerate(shards):
        complete = [("k", "png", b"image"), ("k", "txt", b"caption"), ("k", "cls", b"1")]
        write_tar(folder / f"{number}.tar", [(f"{key}.{suffix}", data) for key, suffix, data in (*complete, *content)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = everything(Shards(find_shards(str(folder), "train")))
        except DataError as error:  # some samples have no class
            with pytest.raises(DataError, match=re.escape(str(error))):
                make_index(str(folder), workers=1)
            return
        make_index(str(folder), workers=1)
        assert everything(Shards(find_shards(str(folder), "train"))) == expected


def test_an_index_of_the_emoji_set_keeps_its_fingerprint(tmp_path: Path) -> None:
    expected = Shards(find_shards(EMOJI, "val"))
    for path in expected.paths:
        (tmp_path / path.name).symlink_to(path)
    make_index(str(tmp_path))
    found = Shards(find_shards(str(tmp_path), "train"))
    assert everything(found) == everything(expected)
    assert found.column("width").to_pylist() == [128] * len(found)
    lengths = found.column("caption_length").to_pylist()
    assert lengths == [len(found.text(i)) for i in range(len(found))]


def test_batches_are_those_without_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, [5, 3, 4], labelled=True)
    data = ShardsData(str(tmp_path), size=(8, 6), workers=0, shuffle_buffer=4)
    expected = list(TrainStream(data.open("train"), 4, 3, 6))
    make_index(str(tmp_path))
    found = list(TrainStream(data.open("train"), 4, 3, 6))
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    assert all((a["image"] == b["image"]).all() for a, b in zip(found, expected, strict=True))


def test_a_part_of_an_index_and_several_of_them(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write_shards(tmp_path / "a", [2, 3, 1])
    write_shards(tmp_path / "b", [2, 2])
    sources = [str(tmp_path / "b"), f"{tmp_path}/a/{{002,000}}.tar"]
    expected = everything(Shards(find_shards(sources, "train")))
    for folder in ("a", "b"):
        make_index(str(tmp_path / folder))
    found = everything(Shards(find_shards(sources, "train")))
    assert found["lengths"] == [2, 2, 1, 2]
    assert all(found[name] == expected[name] for name in ("keys", "images", "values"))
    other = Shards(find_shards(sources[:1], "train")).fingerprint
    assert len({found["fingerprint"], other, Shards(find_shards(sources[1], "train")).fingerprint}) == 3


FIELDS = [
    {"similarity": 0.31, "NSFW": "UNLIKELY", "punsafe": 0, "status": "success", "exif": "{}", "caption": "one"},
    {"similarity": 1, "NSFW": None, "punsafe": 0.5, "caption": "second", "clicks": 3, "list": [1]},
]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Shards as img2dataset writes them, with what lies beside them."""
    for shard in range(2):
        content = []
        for i, fields in enumerate(FIELDS):
            stem = f"{shard:05d}{i:04d}"
            content += [
                (f"{stem}.jpg", PICTURE),
                (f"{stem}.txt", b"text"),
                (f"{stem}.json", json.dumps(fields).encode()),
            ]
        write_tar(tmp_path / f"{shard:05d}.tar", content)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"metadata of img2dataset")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    return tmp_path


def test_fields_of_json_files_become_columns(foreign: Path) -> None:
    make_index(str(foreign), workers=2)
    shards = Shards(find_shards(str(foreign), "train"))
    assert shards.columns == ["width", "height", "caption_length", "similarity", "NSFW", "punsafe", "clicks"]
    assert shards.column("similarity").to_pylist() == [0.31, 1.0] * 2
    assert shards.column("NSFW").to_pylist() == ["UNLIKELY", None] * 2
    assert shards.column("clicks").to_pylist() == [None, 3] * 2
    assert shards.column("height").to_pylist() == [5] * 4
    kept = shards.keep(np.flatnonzero(shards.column("punsafe").to_numpy() > 0.1))
    assert list(kept.keys) == ["000000001", "000010001"]
    assert kept.lengths == [1, 1]
    assert kept.column("clicks").to_pylist() == [3, 3]
    assert kept.image(1) == PICTURE
    assert kept.fingerprint != shards.fingerprint
    with pytest.raises(DataError, match=r"unknown column of the index 'aesthetic'.*Known: NSFW"):
        shards.column("aesthetic")
    make_index(str(foreign), options=IndexOptions(fields=("clicks", "caption"), caption_field="caption"))
    shards = Shards(find_shards(str(foreign), "train"))
    assert shards.columns == ["width", "height", "caption_length", "caption", "clicks"]
    assert shards.column("caption_length").to_pylist() == [3, 6] * 2


@pytest.mark.parametrize("indexed", [False, True])
def test_captions_and_labels_may_come_from_fields(foreign: Path, indexed: bool) -> None:
    if indexed:
        make_index(str(foreign))
    data = ShardsData(str(foreign), size=4, workers=0, caption_field="caption")
    samples = data.open("train")
    assert samples.all_annotations()["text"][:2] == ["one", "second"]
    assert samples.fingerprint != ShardsData(str(foreign), size=4, workers=0).open("train").fingerprint
    shards = Shards.open(str(foreign), "train", label_field="clicks")
    assert shards.value(1, LABEL) == 3
    with pytest.raises(
        DataError, match=r"the class of '000000000' in .* is missing, since its \.json has no field 'clicks'"
    ):
        shards.value(0, LABEL)


def replace(folder: Path) -> None:
    """Another shard of the same size."""
    data = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(data[:-12000] + b"x" + data[-11999:])


def shorten(folder: Path) -> None:
    (folder / "001.tar").write_bytes((folder / "001.tar").read_bytes()[:-512])


def remove(folder: Path) -> None:
    (folder / "001.tar").unlink()


def add(folder: Path) -> None:
    (folder / "002.tar").write_bytes((folder / "001.tar").read_bytes())


def damage(folder: Path) -> None:
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-9])


def use_another(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"url": ["a"]}), folder / INDEX)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace, r"the shard .*001\.tar is not the one that the index .* lists"),
        (shorten, r"the shard .*001\.tar is not the one that the index .* lists"),
        (remove, r"not those that the index .* lists \(001\.tar\)"),
        (add, r"not those that the index .* lists \(002\.tar\)"),
        (damage, r"the index .* cannot be read"),
        (use_another, "is not an index of shards"),
    ],
)
def test_an_index_of_other_shards_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    write_shards(tmp_path, [2, 2])
    make_index(str(tmp_path))
    change(tmp_path)
    with pytest.raises(DataError, match=rf"{message}.*tools/prepare\.py index") as error:
        Shards.open(str(tmp_path), "train")
    assert "\n" not in str(error.value)


def test_an_interrupted_indexing_reads_no_shard_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [1, 1, 1])
    shard = tmp_path / "002.tar"
    content = shard.read_bytes()
    shard.write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match="not a tar file"):
        make_index(str(tmp_path), workers=1)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".indexing").iterdir()}
    assert before.keys() == {"000.tar.parquet", "001.tar.parquet"}
    shard.write_bytes(content)
    read: list[str] = []

    def scan(path: Path, visit: Any) -> ShardContent:
        read.append(path.name)
        return scan_shard(path, visit)

    monkeypatch.setattr("ldm.data.indexing.scan_shard", scan)
    make_index(str(tmp_path), workers=1)
    assert read == ["002.tar"]
    assert len(Shards.open(str(tmp_path), "train")) == 3
    assert not (tmp_path / ".indexing").exists()


def test_an_index_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [2, 1])
    index = make_index(str(tmp_path / "shards"), str(tmp_path / "set.parquet"))
    assert isinstance(index, ShardIndex)
    shards = Shards.open(str(tmp_path / "set.parquet"), "train")
    assert shards.lengths == [2, 1]
    assert shards.text(2) == "caption 2"
    assert shards.columns
