from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.cli import prepare
from ldm.data import BatchIndices, ShardsData
from ldm.data.caption_choice import CaptionConfig
from ldm.data.folder import prepare_folder
from ldm.data.parquet_images import prepare_parquet
from ldm.data.shards import SPLITS, Shards, find_shards
from ldm.errors import DataError
from ldm.modalities.label import LABEL
from tests.data.pictures import encoded, noise_picture


def images(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": encoded(noise_picture(i), "JPEG"), "path": f"{i}.jpg"} for i in range(first, first + count)]


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, rows: int = 4) -> Path:
    """A file as `datasets` writes it, with row groups of some rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows)
    return path


def everything(destination: Path) -> dict[str, list[tuple[str, str, bytes]]]:
    found = {}
    for split in SPLITS:
        if (destination / split).is_dir():
            shards = Shards(find_shards(str(destination / split), split))
            found[split] = [(key, shards.text(i), shards.image(i)) for i, key in enumerate(shards.keys)]
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_become_samples_of_the_splits_that_the_files_are_named_after(tmp_path: Path) -> None:
    counts = {"train-00000-of-00002": 5, "train-00001-of-00002": 6, "validation-00000-of-00001": 3}
    for name, count in counts.items():
        captions = [f"caption {i} of {name}" for i in range(count)]
        write(tmp_path / "data" / f"{name}.parquet", {"id": [*range(count)], "image": images(count), "text": captions})
    for destination in ("shards", "again"):
        report = prepare_parquet([str(tmp_path / "data")], tmp_path / destination, shard_size=4)
    assert report.images == {"train": 11, "val": 3, "test": 0}
    assert report.named_splits
    expected = [
        (f"{name}/{i:08d}", f"caption {i} of {name}", images(count)[i]["bytes"])
        for name, count in counts.items()
        for i in range(count)
    ]
    assert everything(tmp_path / "shards") == {"train": expected[:11], "val": expected[11:]}
    assert [path.name for path in sorted((tmp_path / "shards" / "train").iterdir())] == [
        *(f"{i:06d}.tar" for i in range(3)),
        "index.parquet",
    ]
    assert content(tmp_path / "shards") == content(tmp_path / "again")
    shards = Shards(find_shards(str(tmp_path / "shards" / "val"), "val"))
    assert shards.column("width").to_pylist() == [12] * 3
    by_hash = prepare_parquet([str(tmp_path / "data")], tmp_path / "shards", shares=(0.5, 0.25, 0.25))
    assert not by_hash.named_splits
    assert sum(by_hash.images.values()) == 14


def test_lists_of_captions_are_read_as_data_captions_format_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [["one", " two "], ["three"], [], None, [""]]
    path = write(tmp_path / "a.b.parquet", {"jpg": [each["bytes"] for each in images(5)], "captions": texts})
    monkeypatch.setattr(
        sys, "argv", ["prepare.py", "parquet", str(path), str(tmp_path / "shards"), "--shares", "1,0,0"]
    )
    with pytest.raises(SystemExit) as stopped:
        prepare.main()
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert f"data: {{kind: shards, train: {tmp_path / 'shards' / 'train'}, captions: {{format: json}}}}" in printed
    assert "left out, no caption: 3 (a_b/00000002, a_b/00000003, a_b/00000004)" in printed
    data = ShardsData(str(tmp_path / "shards" / "train"), size=8, workers=0, captions=CaptionConfig(format="json"))
    samples = data.open("train")
    assert samples.all_captions("the test") == ["one", "two", "three"]
    assert samples[BatchIndices(np.arange(2))]["key"] == ["a_b/00000000", "a_b/00000001"]
    assert samples.shards.column("caption_length").to_pylist() == [3, 5]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.string(), 2),
        pa.large_list(pa.string()),
    ],
    ids=str,
)
def test_captions_of_all_arrow_types_of_text_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [["a", "b"], ["c", "d"]] if hasattr(kind, "value_field") else ["a", "c"]
    data = pa.array([each["bytes"] for each in images(2)], pa.binary_view())
    path = write(tmp_path / "a.parquet", {"image": data, "text": pa.array(texts, kind)})
    report = prepare_parquet([str(path)], tmp_path / "shards", shares=(1, 0, 0))
    captions = [text for _, text, _ in everything(tmp_path / "shards")["train"]]
    assert captions == (texts if report.caption_format == "text" else list(map(json.dumps, texts)))


def test_class_labels_bring_their_names(tmp_path: Path) -> None:
    features = {"photo": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["cat", "sea_lion"]}}
    columns = {"photo": images(4), "thumbnail": images(4, 9), "kind": [1, 0, -1, 7]}
    path = write(tmp_path / "a.parquet", columns, features)
    settings: dict[str, Any] = {"label_column": "kind", "shares": (1, 0, 0)}
    report = prepare_parquet([str(path)], tmp_path / "a", caption_template="a photo of a {}", **settings)
    assert report.classes == ["cat", "sea_lion"]
    assert report.left_out == {"no class": {"a/00000002": "-1", "a/00000003": "7"}}
    shards = Shards(find_shards(str(tmp_path / "a" / "train"), "train"))
    assert [shards.value(i, LABEL) for i in range(2)] == [1, 0]
    assert [shards.text(i) for i in range(2)] == ["a photo of a sea lion", "a photo of a cat"]
    assert shards.image(0) == columns["photo"][0]["bytes"]
    prepare_parquet([str(path)], tmp_path / "b", **settings)
    assert list(Shards(find_shards(str(tmp_path / "b" / "train"), "train")).modalities) == ["label"]


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    small, large = encoded(noise_picture(0, 4, 4)), encoded(noise_picture(0, 40, 20), "BMP")
    files = [small, large, b"no image", None, images(1)[0]["bytes"]]
    pictures = [{"bytes": data, "path": "x"} for data in files]
    path = write(tmp_path / "a.parquet", {"image": pictures, "text": ["a", "b", "c", "d", None]})
    report = prepare_parquet([str(path)], tmp_path / "shards", shares=(1, 0, 0), min_size=8, max_size=20)
    assert {reason: list(names) for reason, names in report.left_out.items()} == {
        "smaller than 8 pixels": ["a/00000000"],
        "unreadable": ["a/00000002"],
        "image is not embedded": ["a/00000003"],
        "no caption": ["a/00000004"],
    }
    ((key, text, _),) = everything(tmp_path / "shards")["train"]
    assert (key, text) == ("a/00000001", "b")
    assert Shards(find_shards(str(tmp_path / "shards" / "train"), "train")).column("height").to_pylist() == [20]


def test_near_duplicates_are_dropped_over_all_files(tmp_path: Path) -> None:
    for number, (name, side) in enumerate({"train": 64, "test": 96}.items()):
        smooth = [
            noise_picture(i, 6, 6).resize((side, side), Image.Resampling.BICUBIC) for i in range(number, 4 + number)
        ]
        files = [{"bytes": encoded(each), "path": None} for each in smooth]
        write(tmp_path / f"{name}.parquet", {"image": files, "text": [f"image {i}" for i in range(number, 4 + number)]})
    report = prepare_parquet([str(tmp_path)], tmp_path / "shards", drop_duplicates=4)
    expected = {f"train/{i:08d}": f"of test/{i - 1:08d}" for i in (1, 2, 3)}
    assert report.left_out == {"near duplicate": expected}
    texts = {split: [text for _, text, _ in found] for split, found in everything(tmp_path / "shards").items()}
    assert texts == {"train": ["image 0"], "test": [f"image {i}" for i in range(1, 5)]}


NO_IMAGE = {"image": ["a"], "text": ["b"]}
NO_CAPTION = {"image": images(1), "title": ["a"]}


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (NO_IMAGE, {}, r"a\.parquet has no columns that hold images, of image, text; choose one with --image-column"),
        (NO_IMAGE, {"image_column": "text"}, r"the column 'text' of .* holds string, not the bytes of images"),
        (NO_IMAGE, {"image_column": "img"}, r"a\.parquet: unknown column 'img'; did you mean 'image'\?"),
        (NO_CAPTION, {}, r"no column of captions among image, title; choose one with --caption-column"),
        (NO_CAPTION, {"label_column": "title"}, r"the column 'title' of .* holds string, not class numbers"),
        (NO_CAPTION | {"text": [3]}, {}, r"the column 'text' of .* holds int64, not texts"),
        (NO_CAPTION | {"text": ["a"]}, {"caption_template": "a {}"}, r"'a \{\}' needs \{\}, and a label column"),
        (NO_CAPTION | {"text": [""]}, {}, r"no image of .* is left to train on; see the reasons in .*report\.json"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_the_set_of_before(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    good = write(tmp_path / "good.parquet", {"image": images(2), "text": ["a", "b"]})
    prepare_parquet([str(good)], tmp_path / "shards", shares=(1, 0, 0))
    before = everything(tmp_path / "shards")
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=message) as error:
        prepare_parquet([str(path)], tmp_path / "shards", **settings)
    assert "\n" not in str(error.value)
    assert everything(tmp_path / "shards") == before


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no parquet file in .*none.*; give files"):
        prepare_parquet([str(tmp_path / "none")], tmp_path / "shards")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        prepare_parquet([str(tmp_path / "a.parquet")], tmp_path / "shards")
    write(tmp_path / "b" / "0.parquet", {"image": images(1), "text": ["a"]})
    write(tmp_path / "b" / "1.parquet", {"image": images(1), "caption": ["a"]})
    with pytest.raises(DataError, match=r"the columns of .*1\.parquet are not those of the files before it"):
        prepare_parquet([str(tmp_path / "b")], tmp_path / "shards")
    with pytest.raises(DataError, match=r"0\.parquet occurs twice"):
        prepare_parquet([str(tmp_path / "b"), str(tmp_path / "b" / "0.parquet")], tmp_path / "shards")
    for name in ("x.y", "x_y"):
        write(tmp_path / "c" / f"{name}.parquet", {"image": images(1), "text": ["a"]})
    with pytest.raises(DataError, match=r"2 parquet files have the name x_y apart from"):
        prepare_parquet([str(tmp_path / "c")], tmp_path / "shards")


def test_a_parquet_file_gives_the_samples_that_a_folder_gives(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images(6)):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(image["bytes"])
        (tmp_path / "images" / f"{i}.txt").write_text(f"caption {i}")
    path = write(tmp_path / "a.parquet", {"image": images(6), "text": [f"caption {i}" for i in range(6)]})
    prepare_folder(tmp_path / "images", tmp_path / "one", shares=(1, 0, 0), max_size=8)
    prepare_parquet([str(path)], tmp_path / "other", shares=(1, 0, 0), max_size=8)
    one, other = ({text: image for _, text, image in everything(tmp_path / each)["train"]} for each in ("one", "other"))
    assert one == other


PEAK = """
import re, sys
from pathlib import Path
from ldm.data.parquet_images import prepare_parquet
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1000
prepare_parquet([sys.argv[1] + "/small.parquet"], Path(sys.argv[1]) / "first", shares=(1, 0, 0), workers=1)
before = peak()
prepare_parquet([sys.argv[1] + "/large.parquet"], Path(sys.argv[1]) / "second", shares=(1, 0, 0), workers=1)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_row_group(tmp_path: Path) -> None:
    image = encoded(noise_picture(0)) + bytes(250_000)  # that much behind the end of a file is ignored
    for name, rows in {"small": 192, "large": 1280}.items():
        columns = {"image": [image] * rows, "text": [f"caption {i}" for i in range(rows)]}
        write(tmp_path / f"{name}.parquet", columns, rows=64)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # MB, of 320
