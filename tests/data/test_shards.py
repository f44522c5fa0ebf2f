from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data import ShardsData
from ldm.data.bad_samples import Reason
from ldm.data.shards import Sample, Shards, checksum_of, find_shards, write_shard
from ldm.errors import DataError
from ldm.modalities.label import LABEL
from tests.data.pictures import encoded, noise_picture, sample, write_shards, write_tar


def as_read(shards: Shards) -> list[tuple[str, str, bytes, int | None]]:
    return [
        (key, shards.text(i), shards.image(i), shards.value(i, LABEL) if "label" in shards.modalities else None)
        for i, key in enumerate(shards.keys)
    ]


def as_written(samples: list[Sample]) -> list[tuple[str, str, bytes, int | None]]:
    return [(s.key, s.text, s.image, s.annotations.get("label")) for s in samples]


keys = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="./\\"), min_size=1, max_size=120)
captions = st.text(st.characters(exclude_categories=["Cs"])).map(str.strip)


@given(
    st.dictionaries(keys, st.tuples(captions, st.binary(max_size=1500)), min_size=1, max_size=5),
    st.booleans(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[str, bytes]], labelled: bool
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.tar"
    samples = [
        Sample(key, text, picture, "jpg", {"label": number} if labelled else {})
        for number, (key, (text, picture)) in enumerate(content.items())
    ]
    assert write_shard(path, samples) == len(samples)
    assert as_read(Shards([path])) == as_written(samples)


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [3, 2], labelled=True)
    theirs = [
        (s["__key__"], s["txt"].decode(), s["png"], int(s["cls"]))
        for s in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    ]
    assert theirs == as_read(Shards(paths))


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    samples = [sample(i, labelled=True) for i in range(4)]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for s in samples:
            writer.write(
                {"__key__": s.key, "png": s.image, "txt": s.text, "cls": s.annotations["label"], "json": {"more": 1}}
            )
    assert as_read(Shards([tmp_path / "a.tar"])) == as_written(samples)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, [sample(i) for i in range(3)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_shard_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        yield sample(0)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_shard(tmp_path / "a.tar", samples())
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60)
@given(st.integers(0, 10**6))
@pytest.mark.filterwarnings("ignore:.*truncated after")
def test_a_shard_cut_anywhere_keeps_the_samples_before_the_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    paths = write_shards(tmp_path_factory.mktemp("cut"), [1, 3], labelled=True)
    with tarfile.open(paths[1]) as tar:
        starts = {info.name: info.offset_data for info in tar}
        ends = {info.name.partition(".")[0]: info.offset_data + info.size for info in tar}
    complete = paths[1].read_bytes()
    cut %= max(ends.values())  # the end of the checksum
    paths[1].write_bytes(complete[:cut])
    shards = Shards(paths)
    before = [key for key in ("0001", "0002", "0003") if ends[key] <= cut]
    alone = before == ["0001"] and starts["0002.png"] > cut  # it may lack members
    assert list(shards.keys) == ["0000", *([] if alone else before)]
    (record,) = shards.dropped
    assert (record.reason, record.shard) == (Reason.TRUNCATED_SHARD, str(paths[1]))
    assert record.key not in shards.keys
    assert shards.fingerprint


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_truncated_shard_of_a_prepared_set_is_refused(tmp_path: Path, share: float) -> None:
    (path,) = write_shards(tmp_path / "train", [3])
    report = {"pictures": {"train": 3}, "shards": {"train": {path.name: checksum_of(path)}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert len(Shards([path])) == 3
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size) // 512 * 512])
    with pytest.raises(DataError, match=r"000\.tar is not the one that the report next to its folder lists"):
        Shards([path])


def test_sources(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [1, 1, 1])
    assert find_shards(str(tmp_path), "train") == paths
    assert find_shards(str(paths[1]), "train") == paths[1:2]
    assert find_shards(f"{tmp_path}/{{000..002}}.tar", "train") == paths
    assert find_shards(f"{tmp_path}/00[12].tar", "train") == paths[1:]
    assert find_shards([str(paths[2]), f"{tmp_path}/00{{0,1}}.tar"], "train") == [paths[2], *paths[:2]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.tar", r"missing\.tar does not exist"),
        ("{000..002}.tar", r"001\.tar does not exist"),
        ("none-*.tar", r"no shard matches .*none-\*\.tar"),
        ("empty", r"empty contains no \.tar shards"),
        ("{000..002.tar", "close each brace"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, source: str, message: str) -> None:
    write_shards(tmp_path, [1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as error:
        find_shards(f"{tmp_path}/{source}", "train")
    assert "\n" not in str(error.value)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "there is no sample"),
        ({"readme.md": b"text"}, "there is no sample"),
        ({"a.txt": b"caption"}, "'a' in .* has no image"),
        ({"a.jpg": b""}, "'a' in .* has neither caption"),
        ({"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "b.txt": b"b"}, "'b' in .* has none"),
    ],
)
def test_shards_that_lack_something(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Shards([tar(tmp_path / "a.tar", members)])


@pytest.mark.parametrize(
    ("members", "read", "message"),
    [
        ({"a.jpg": b"", "a.cls": b"one"}, lambda shards, i: shards.value(i, LABEL), "class of 'a' in .* is b'one'"),
        ({"a.jpg": b"", "a.txt": b"\xff"}, Shards.text, "caption of 'a' in .* is not UTF-8"),
    ],
)
def test_samples_that_say_nothing(
    tmp_path: Path, members: dict[str, bytes], read: Callable[[Shards, int], object], message: str
) -> None:
    shards = Shards([tar(tmp_path / "a.tar", members)])
    with pytest.raises(DataError, match=message):
        read(shards, 0)


def test_a_file_that_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="is truncated or not a tar file"):
        Shards([tmp_path / "a.tar"])


def test_a_shard_listed_twice(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [2])
    with pytest.raises(DataError, match="occurs twice"):
        Shards([path, path])


def test_a_shard_that_shrinks_while_in_use(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [2])
    shards = Shards([path])
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="become shorter"):
        shards.image(1)
    path.unlink()
    with pytest.raises(DataError, match="cannot read the shard"):
        shards.image(1)


def test_the_fingerprint_follows_the_content_and_not_the_folder(tmp_path: Path) -> None:
    for name, length in {"a": 2, "b": 2, "c": 3}.items():
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, [length])
    a, b, c = (Shards([tmp_path / name / "000.tar"]).fingerprint for name in "abc")
    assert a == b != c


PICTURE = encoded(noise_picture(0))
GOOD = {"good.png": PICTURE, "good.txt": b"good"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"caption"}, r"^1 of 2 samples are skipped, the first of them 'a' in .*a\.tar: they have no image"),
        ({"a.png": PICTURE}, r"they have neither caption \(\.txt\) nor class"),
        ({"a.png": PICTURE, "a.json": b"{}", "a.input.png": PICTURE}, r"they have neither caption"),
    ],
)
def test_incomplete_samples_are_skipped_and_counted(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        shards = Shards([tar(tmp_path / "a.tar", {**members, **GOOD})])
    assert (list(shards.keys), shards.lengths, shards.text(0)) == (["good"], [1], "good")


def test_labelled_samples_without_a_caption_are_skipped_if_others_have_one(tmp_path: Path) -> None:
    members = {"a.png": PICTURE, "a.cls": b"1", **GOOD, "good.cls": b"2"}
    with pytest.warns(UserWarning, match=r"^1 of 2 samples .* no caption \(\.txt\)"):
        shards = Shards([tar(tmp_path / "a.tar", members)])
    assert (list(shards.keys), shards.value(0, LABEL)) == (["good"], 2)


def test_a_set_without_captions_has_no_empty_ones(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": PICTURE, "a.cls": b"1"})
    samples = ShardsData(str(path), workers=0).open("train")
    assert set(samples.all_annotations()) == {"key", "label"}


@pytest.mark.parametrize(
    "members",
    [
        [("a.png", PICTURE), ("a.txt", b"first"), ("a.txt", b"second")],
        [("a.png", PICTURE), ("a.jpg", b"second"), ("a.txt", b"first")],
        [("a.png", PICTURE), ("a.txt", b"first"), ("b.png", b""), ("b.txt", b""), ("a.png", b""), ("a.txt", b"")],
    ],
)
def test_a_key_twice_in_a_shard_is_counted_and_the_first_is_used(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    with pytest.warns(
        UserWarning, match=r"^1 samples are skipped, the first of them 'a' in .*a\.tar: an earlier sample"
    ):
        shards = Shards([write_tar(tmp_path / "a.tar", members)])
    assert (shards.image(0), shards.text(0)) == (PICTURE, "first")


def test_keys_that_restart_in_each_shard_are_told_apart_by_it(tmp_path: Path) -> None:
    paths = []
    for name in ("one/000.tar", "one/001.tar", "two/000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paths.append(tar(tmp_path / name, {"0.png": PICTURE, "0.txt": name.encode()}))
    shards = Shards(paths)
    assert list(shards.keys) == ["one/000/0", "one/001/0", "two/000/0"]
    assert [shards.text(i) for i in range(3)] == ["one/000.tar", "one/001.tar", "two/000.tar"]
    assert list(Shards(paths[:1]).keys) == ["0"]
    fingerprint, moved = shards.fingerprint, tmp_path / "moved"
    moved.mkdir()
    for name in ("one", "two"):
        (tmp_path / name).rename(moved / name)
    assert Shards([moved / path.relative_to(tmp_path) for path in paths]).fingerprint == fingerprint


@pytest.mark.parametrize("name", [b"caf\xe9", "café".encode(), b"a\nb", b"a b", b"x" * 200])
def test_keys_of_any_bytes(tmp_path: Path, name: bytes) -> None:
    stem = os.fsdecode(name)
    shards = Shards([tar(tmp_path / "a.tar", {f"{stem}.png": PICTURE, f"{stem}.txt": b"caption"})])
    assert os.fsencode(shards.keys[0]) == name
    assert shards.fingerprint
    assert shards.text(0) == "caption"
