"""Folders as Hugging Face's imagefolder has them, and near duplicates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from ldm.data.folder import prepare_folder
from ldm.data.set_writer import named_splits, split_named
from ldm.data.shards import SPLITS, Shards, find_shards
from ldm.errors import DataError, MissingExtraError
from ldm.modalities.label import LABEL
from tests.data.pictures import encoded, noise_picture


def put(path: Path, seed: int = 0, *, side: int = 64, caption: str | None = "a caption") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth = noise_picture(seed, 6, 6).resize((128, 128), Image.Resampling.BICUBIC)
    path.write_bytes(encoded(smooth.resize((side, side), Image.Resampling.LANCZOS), "JPEG", quality=95 - seed % 20))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def opened(destination: Path) -> dict[str, Shards]:
    folders = {split: destination / split for split in SPLITS}
    return {split: Shards(find_shards(str(folder), split)) for split, folder in folders.items() if folder.is_dir()}


def keys(destination: Path) -> dict[str, set[str]]:
    return {split: {*shards.keys} for split, shards in opened(destination).items()}


def report_of(destination: Path) -> dict[str, object]:
    report: dict[str, object] = json.loads((destination / "report.json").read_text())
    return report


def test_of_near_duplicates_the_largest_stays_in_its_split(tmp_path: Path) -> None:
    for seed in range(20):
        put(tmp_path / "images" / f"{seed}.jpg", seed)
    shares = (0.5, 0.25, 0.25)
    prepare_folder(tmp_path / "images", tmp_path / "plain", shares=shares)
    before = keys(tmp_path / "plain")
    assert min(map(len, before.values())) > 0
    for seed in range(20):
        put(tmp_path / "images" / f"small copy of {seed}.jpg", seed, side=40)
    for destination in ("shards", "again"):
        report = prepare_folder(tmp_path / "images", tmp_path / destination, shares=shares, drop_duplicates=4)
        assert keys(tmp_path / destination) == before
    expected = {f"small copy of {seed}.jpg": f"of {seed}.jpg" for seed in range(20)}
    assert report.left_out == {"near duplicate": expected}
    assert report_of(tmp_path / "shards")["left_out"] == {"near duplicate": expected}
    assert (tmp_path / "shards" / "train" / "000000.tar").read_bytes() == (
        tmp_path / "again" / "train" / "000000.tar"
    ).read_bytes()


def test_white_and_black_icons_on_transparency_are_not_near_duplicates(tmp_path: Path) -> None:
    for seed in range(6):
        shape = noise_picture(seed, 5, 5).convert("L").point(lambda value: 255 * (value > 127)).resize((64, 64), 0)
        for color in ("white", "black"):
            icon = Image.new("RGBA", shape.size, (*ImageColor.getrgb(color), 0))
            icon.putalpha(shape)
            path = tmp_path / "images" / f"{color} {seed}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded(icon))
            path.with_suffix(".txt").write_text("an icon")
    report = prepare_folder(tmp_path / "images", tmp_path / "shards", shares=(1, 0, 0), drop_duplicates=4)
    assert report.images["train"] == 12


def test_without_imagehash_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "images" / "a.jpg")
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    with pytest.raises(MissingExtraError, match=r"ImageHash.*ldm\[duplicates\]"):
        prepare_folder(tmp_path / "images", tmp_path / "shards", drop_duplicates=4)


def test_folders_of_splits_are_the_splits_unless_shares_are_given(tmp_path: Path) -> None:
    for i, folder in enumerate(["train", "train/part", "validation", "Test"] * 3):
        put(tmp_path / "images" / folder / f"{i}.jpg", i)
    report = prepare_folder(tmp_path / "images", tmp_path / "shards")
    assert report.images == {"train": 6, "val": 3, "test": 3}
    assert "splits: by the names" in report.summary()
    assert all(key.startswith("validation/") for key in keys(tmp_path / "shards")["val"])
    given = prepare_folder(tmp_path / "images", tmp_path / "given", shares=(1, 0, 0))
    assert given.images == {"train": 12, "val": 0, "test": 0}
    assert "splits" not in given.summary()
    put(tmp_path / "images" / "further.jpg", 99)
    assert not prepare_folder(tmp_path / "images", tmp_path / "shards").named_splits


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train-00000-of-00002", "validation-00000-of-00001", "test"], True),
        (["train_0", "dev_0"], True),
        (["train-0", "train-1"], False),
        (["train-0", "more-1"], False),
        (["validation", "test"], False),
    ],
)
def test_names_give_the_splits_if_all_name_one_and_there_are_several(names: list[str], expected: bool) -> None:
    assert named_splits([split_named(name) for name in names]) is expected


@pytest.mark.parametrize("template", [None, "a photo of a {}"])
def test_folders_of_classes_give_class_numbers_and_captions(tmp_path: Path, template: str | None) -> None:
    for i, folder in enumerate(["train/sea_lion", "train/cat", "val/cat", "val/deep/zebra"]):
        put(tmp_path / "images" / folder / f"{i}.jpg", i, caption=None)
    put(tmp_path / "images" / "train" / "loose.jpg", 5, caption=None)
    report = prepare_folder(tmp_path / "images", tmp_path / "shards", class_folders=True, caption_template=template)
    assert report_of(tmp_path / "shards")["classes"] == ["cat", "sea_lion", "zebra"]
    assert report.left_out == {"no class folder": {"train/loose.jpg": ""}}
    found = {
        key: (shards.value(i, LABEL), shards.text(i) if "text" in shards.modalities else None)
        for shards in opened(tmp_path / "shards").values()
        for i, key in enumerate(shards.keys)
    }
    labels = {"train/sea_lion/0": 1, "train/cat/1": 0, "val/cat/2": 0, "val/deep/zebra/3": 2}
    names = ["cat", "sea lion", "zebra"]
    assert found == {key: (n, template and f"a photo of a {names[n]}") for key, n in labels.items()}


def test_images_without_a_caption_are_left_out_if_others_have_one(tmp_path: Path) -> None:
    put(tmp_path / "images" / "cat" / "0.jpg", 0)
    put(tmp_path / "images" / "cat" / "1.jpg", 1, caption=None)
    report = prepare_folder(tmp_path / "images", tmp_path / "shards", shares=(1, 0, 0), class_folders=True)
    assert report.left_out == {"no caption": {"cat/1.jpg": ""}}
    assert opened(tmp_path / "shards")["train"].text(0) == "a caption"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_duplicates": 11}, "up to 11 bits; give a number from 0 to 10"),
        ({"caption_template": "a {}"}, r"'a \{\}' needs class folders"),
        ({"caption_template": "a photo", "class_folders": True}, r"'a photo' needs class folders, and \{\}"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_folder(tmp_path, tmp_path / "shards", **settings)  # type: ignore[arg-type]
