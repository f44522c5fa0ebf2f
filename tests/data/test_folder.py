from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.folder import prepare_folder, split_of
from ldm.data.shards import SPLITS, Shards, find_shards
from ldm.data.transforms import decode
from ldm.errors import DataError
from ldm.modalities.boxes import BOXES
from ldm.modalities.semantic import SEMANTIC
from tests.data.pictures import encoded, noise_picture


def put(folder: Path, name: str, caption: str | None = "a caption", *, seed: int = 0, size: int = 8) -> bytes:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    file_format = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}[path.suffix]
    path.write_bytes(encoded(noise_picture(seed, size, size), file_format))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path.read_bytes()


def everything(destination: Path) -> dict[str, tuple[str, bytes]]:
    """Key to caption and image, of all splits."""
    found: dict[str, tuple[str, bytes]] = {}
    for split in SPLITS:
        if (destination / split).is_dir():
            shards = Shards(find_shards(str(destination / split), split))
            found |= {key: (shards.text(i), shards.image(i)) for i, key in enumerate(shards.keys)}
    return found


def left_out(destination: Path) -> dict[str, list[str]]:
    report = json.loads((destination / "report.json").read_text(encoding="utf-8"))
    return {reason: sorted(names) for reason, names in report["left_out"].items()}


def test_pictures_and_captions_come_through_as_they_are(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "shards"
    expected = {}
    for i, suffix in enumerate(["jpg", "png", "webp"] * 4):
        name, caption = f"part {i % 2}/größe {i}", f"подпись {i}"
        expected[name] = (caption, put(source, f"{name}.{suffix}", f" {caption}\n", seed=i))
    report = prepare_folder(source, destination, shard_size=5, shares=(0.5, 0.25, 0.25))
    assert everything(destination) == expected
    assert sum(report.images.values()) == 12
    assert left_out(destination) == {}
    assert len(list((destination / "train").glob("*.tar"))) == -(-report.images["train"] // 5)


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "shards"
    put(source, "good.png")
    put(source, "silent.png", None)
    put(source, "empty.png", " \n")
    put(source, "small.png", size=7)
    whole = put(source, "cut.png")
    (source / "cut.png").write_bytes(whole[:-60])
    put(source, "garbled.png")
    (source / "garbled.txt").write_bytes(b"\xff\xfe\xfd")
    put(source, "good.webp")
    (source / "movie.mp4").write_bytes(b"")
    report = prepare_folder(source, destination, min_size=8, shares=(1, 0, 0))
    assert list(everything(destination)) == ["good"]
    assert left_out(destination) == {
        "no caption": ["silent.png"],
        "empty caption": ["empty.png"],
        "smaller than 8 pixels": ["small.png"],
        "unreadable": ["cut.png"],
        "caption is not UTF-8": ["garbled.png"],
        "same name but for suffix or dots": ["good.webp"],
    }
    for names in left_out(destination).values():
        assert all(name in report.summary() for name in names)
    assert "1 .mp4" in report.summary()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_gives_captions(tmp_path: Path, kind: str) -> None:
    source, destination = tmp_path / "source", tmp_path / "shards"
    put(source, "a.png", None)
    put(source, "deep/b.png", None)
    put(source, "c.png", "beside")
    put(source, "d.png", "beside, but the metadata count")
    rows = [
        ("a.png", 'with "quotes", and commas'),
        ("deep/b.png", "deep"),
        ("d.png", "metadata"),
        ("gone.png", "x"),
    ]
    rows += [("a.png", "again")]
    if kind == "csv":
        lines = [
            "file_name,text,more",
            *(f'"{name}","{text.replace(chr(34), chr(34) * 2)}",1' for name, text in rows),
        ]
    else:
        lines = [
            *(json.dumps({"file_name": name, "text": text, "more": 1}) for name, text in rows),
            "",
            "{broken",
            "[1]",
        ]
    (source / f"metadata.{kind}").write_text("\n".join(lines), encoding="utf-8")
    prepare_folder(source, destination, shares=(1, 0, 0))
    texts = {key: text for key, (text, _) in everything(destination).items()}
    assert texts == {"a": 'with "quotes", and commas', "deep/b": "deep", "c": "beside", "d": "metadata"}
    offset = 2 if kind == "csv" else 1
    expected = {
        "in the metadata but not there": [f"metadata.{kind}:{3 + offset}"],
        "in the metadata twice": [f"metadata.{kind}:{4 + offset}"],
    }
    if kind == "jsonl":
        expected["metadata without file_name and text"] = ["metadata.jsonl:7", "metadata.jsonl:8"]
    assert left_out(destination) == expected


def test_metadata_without_its_columns(tmp_path: Path) -> None:
    put(tmp_path / "source", "a.png")
    (tmp_path / "source" / "metadata.csv").write_text("name,text\na.png,caption\n")
    with pytest.raises(DataError, match=r"metadata\.csv has no column file_name"):
        prepare_folder(tmp_path / "source", tmp_path / "shards")


def test_a_picture_listed_without_a_caption_has_an_empty_one(tmp_path: Path) -> None:
    put(tmp_path / "source", "a.png", None)
    put(tmp_path / "source", "b.png")
    (tmp_path / "source" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": null}\n')
    prepare_folder(tmp_path / "source", tmp_path / "shards", shares=(1, 0, 0))
    assert left_out(tmp_path / "shards") == {"empty caption": ["a.png"]}


def test_large_pictures_are_scaled_down_and_others_copied(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "shards"
    put(source, "large.jpg", size=40)
    put(source, "large_too.webp", size=40)
    small = put(source, "small.jpg", size=16)
    put(source, "other.bmp", seed=5)
    prepare_folder(source, destination, max_size=20, shares=(1, 0, 0))
    pictures = {key: picture for key, (_, picture) in everything(destination).items()}
    assert decode(pictures["large"]).size == decode(pictures["large_too"]).size == (20, 20)
    assert pictures["small"] == small
    assert np.array_equal(decode(pictures["other"]), noise_picture(5, 8, 8))


def test_again_gives_the_same_and_removes_what_is_stale(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "shards"
    for i in range(6):
        put(source, f"{i}.png", seed=i)

    def run(shard_size: int) -> dict[str, bytes]:
        prepare_folder(source, destination, shard_size=shard_size, shares=(1, 0, 0))
        return {str(p.relative_to(destination)): p.read_bytes() for p in destination.rglob("*") if p.is_file()}

    assert len(run(2)) == 5
    once = run(3)
    assert set(once) == {"train/000000.tar", "train/000001.tar", "train/index.parquet", "report.json"}
    assert run(3) == once


def test_shards_may_lie_within_the_folder_of_the_pictures(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for _ in range(2):
        report = prepare_folder(tmp_path, tmp_path / "shards", shares=(1, 0, 0))
        assert not report.ignored


def test_pictures_stay_in_their_split_when_others_come(tmp_path: Path) -> None:
    source = tmp_path / "source"

    def splits(count: int) -> dict[str, str]:
        for i in range(count):
            put(source, f"{i}.png", seed=i)
        prepare_folder(source, tmp_path / "shards", shares=(0.4, 0.3, 0.3))
        return {
            key: split for split in SPLITS for key in Shards(find_shards(str(tmp_path / "shards" / split), split)).keys
        }

    before, after = splits(20), splits(40)
    assert before.items() <= after.items()
    assert len(after) == 40


@given(st.lists(st.integers(0, 100), min_size=3, max_size=3).filter(any), st.integers(0, 2**64 - 1))
def test_splits_divide_the_hashes_by_the_shares(weights: list[int], place: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    split = SPLITS.index(split_of(place, shares))
    position = place / 2**64 * sum(weights)
    assert sum(weights[:split]) - 1e-9 <= position <= sum(weights[: split + 1]) + 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (0.5, 0.6, 0.1)}, "add up to 1"),
        ({"shares": (0.5, 0.5)}, "add up to 1"),
        ({"shares": (1.5, -0.5, 0.0)}, "add up to 1"),
        ({"shard_size": 0}, "at least one image"),
        ({"min_size": 9}, r"no image of .* is left to train on; see the reasons in .*report\.json"),
    ],
)
def test_settings_that_leave_nothing(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    put(tmp_path / "source", "a.png")
    with pytest.raises(DataError, match=message):
        prepare_folder(tmp_path / "source", tmp_path / "shards", **settings)


def test_a_destination_that_cannot_be(tmp_path: Path) -> None:
    put(tmp_path / "source", "a.png")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot create the folder .*file"):
        prepare_folder(tmp_path / "source", tmp_path / "file" / "shards")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none does not exist"):
        prepare_folder(tmp_path / "none", tmp_path / "shards")


def put_layout(folder: Path, name: str, boxes: object = (), labels: np.ndarray | None = None) -> None:
    """Boxes and a semantic map beside the image ``name``."""
    (folder / f"{name}.boxes.json").write_text(json.dumps(boxes))
    labels = np.zeros((8, 8), np.uint8) if labels is None else labels
    (folder / f"{name}.semantic.png").write_bytes(encoded(Image.fromarray(labels)))


def test_boxes_and_maps_come_along(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "shards"
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for i, name in enumerate(["a", "b.c"]):
        put(source, f"{name}.png", seed=i)
        put_layout(source, name, [[i, 0, 0, 0.5, 1]], labels + i)
    prepare_folder(source, destination, shares=(1, 0, 0), max_size=6)
    shards = Shards(find_shards(str(destination / "train"), "train"))
    found = {key: (shards.value(i, BOXES), np.asarray(shards.value(i, SEMANTIC))) for i, key in enumerate(shards.keys)}
    assert {key: boxes for key, (boxes, _) in found.items()} == {"a": [(0, 0, 0, 0.5, 1)], "b_c": [(1, 0, 0, 0.5, 1)]}
    assert all(np.array_equal(found[key][1], labels + i) for i, key in enumerate(["a", "b_c"]))


def test_layouts_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "shards"
    for name in ("good", "bad", "broken", "small", "coloured", "unboxed", "unmapped"):
        put(source, f"{name}.png")
        put_layout(source, name)
    (source / "bad.boxes.json").write_text("[[0, 0.5, 0, 0.4, 1]]")
    (source / "broken.boxes.json").write_text("[[0")
    (source / "small.semantic.png").write_bytes(encoded(Image.new("L", (4, 8))))
    (source / "coloured.semantic.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    (source / "unboxed.boxes.json").unlink()
    (source / "unmapped.semantic.png").unlink()
    report = prepare_folder(source, destination, shares=(1, 0, 0))
    assert list(everything(destination)) == ["good"]
    assert left_out(destination) == {
        "no boxes (.boxes.json)": ["unboxed.png"],
        "no semantic map (.semantic.png)": ["unmapped.png"],
        "unusable annotation": ["bad.png", "broken.png", "coloured.png", "small.png"],
    }
    reasons = report.left_out["unusable annotation"]
    assert reasons["small.png"] == "the map is 4 x 8, the image 8 x 8"
    assert "are not a list of (class, x0, y0, x1, y1)" in reasons["bad.png"]
