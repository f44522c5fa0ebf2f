"""Captions and names of any bytes: what can be used is used, and what cannot is named."""

from __future__ import annotations

import json
import os
import tarfile
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.conditioning.conditioner import texts
from ldm.data import BatchIndices
from ldm.data.folder import prepare_folder
from ldm.data.preparation_report import Report
from ldm.data.shards import Shards, find_shards, write_shard
from ldm.errors import DataError
from ldm.modalities.label import LABEL
from ldm.training.stages import train_stage
from tests.data.pictures import encoded, noise_picture, sample
from tests.experiments import tiny_experiment

PICTURE = encoded(noise_picture(0))


def write(folder: Path, files: Mapping[str, bytes | str | None]) -> Path:
    """Files by name; None stands for an image."""
    for name, content in {"good.png": None, "good.txt": "good", **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = PICTURE if content is None else content.encode() if isinstance(content, str) else content
        path.write_bytes(data)
    return folder


def prepared(folder: Path, **settings: Any) -> tuple[dict[str, str], Report]:
    """Captions by key, and the report."""
    destination = folder.with_name("shards")
    report = prepare_folder(folder, destination, shares=(1, 0, 0), **settings)
    assert json.loads((destination / "report.json").read_text(encoding="utf-8"))["left_out"] == report.left_out
    report.summary().encode()
    shards = Shards(find_shards(str(destination / "train"), "train"))
    return {key: shards.text(i) for i, key in enumerate(shards.keys)}, report


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"a.jpg": None, "a.caption": "red"}, "red"),
        ({"a.jpg": None, "a.TXT": "red"}, "red"),
        ({"a.JPG": None, "a.txt": "red"}, "red"),
        ({"a.jpg": None, "a.jpg.txt": "red"}, "red"),
        ({"a.jpg": None, "a.jpg.Caption": "red"}, "red"),
        ({"a.jpg": None, "a.txt": " \n", "a.caption": "red"}, "red"),
        ({"a.jpg": None, "a.txt": "red", "a.json": '{"width": 3}'}, "red"),
        ({"a.jpg": None, "a.json": '{"text": "red"}'}, "red"),
        ({"a.jpg": None, "a.txt": "red\nand green"}, "red\nand green"),
        ({"a.jpg": None, "a.txt": "red\x00green"}, "red\x00green"),
        ({"a.jpg": None, "a.txt": "\ufeffred \ufffd"}, "red \ufffd"),
        ({"a.jpg": None, "a.txt": "rød".encode("utf-16")}, "rød"),
        ({"a.jpg": None, "metadata.jsonl": '{"file_name": "a.jpg", "boxes": []}', "a.txt": "red"}, "red"),
        ({"a.jpg": None, "metadata.jsonl": '{"file_name": "a.jpg", "text": null}', "a.txt": "red"}, "red"),
        ({"a.jpg": None, "metadata.csv": "file_name,boxes\na.jpg,0", "a.txt": "red"}, "red"),
        ({"b/a.jpg": None, "metadata.csv": "file_name,text\n.\\b\\a.jpg,red"}, "red"),
        ({"b/a.jpg": None, "c/metadata.csv": "file_name,text\n../b/a.jpg,red"}, "red"),
        ({"b/a.jpg": None, "METADATA.CSV": "file_name,text\nb/a.jpg,red"}, "red"),
        ({"a.jpg": None, "metadata.csv": "file_name;text\na.jpg;red, green"}, "red, green"),
        ({"a.jpg": None, "metadata.csv": "text\tfile_name\nred; green\ta.jpg"}, "red; green"),
        ({"a.jpg": None, "metadata.tsv": "file_name\ttext\r\na.jpg\tred\r\n"}, "red"),
        ({"a.jpg": None, "metadata.csv": 'file_name , text\na.jpg , "red, green"'}, "red, green"),
        ({"a.jpg": None, "metadata.jsonl": '{"file_name": " a.jpg ", "text": "red"}'}, "red"),
        ({"Cat.JPG": None, "cat.txt": "red"}, "red"),
        ({"cat.jpg": None, "CAT.TXT": "red"}, "red"),
        ({"Cat.JPG": None, "cat.jpg.txt": "red"}, "red"),
        ({"Ä.jpg": None, unicodedata.normalize("NFD", "ä.caption"): "red"}, "red"),
        ({"IMG_1.PNG": None, "img_1.json": '{"text": "red"}'}, "red"),
        ({"B/Cat.JPG": None, "metadata.csv": "file_name,text\nb/cat.jpg,red"}, "red"),
    ],
)
def test_captions_are_read_as_they_are_found(
    tmp_path: Path, files: dict[str, bytes | str | None], caption: str
) -> None:
    captions, report = prepared(write(tmp_path / "images", files))
    captions.pop("good")
    assert list(captions.values()) == [caption]
    assert not report.left_out


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"Cat.jpg": None, "cat.png": None, "cat.txt": "red"}, ["red"]),
        ({"Cat.png": None, "cat.jpg": None, "Cat.txt": "red", "cat.txt": "green"}, ["green", "red"]),
        ({"CAT.png": None, "Cat.txt": "red", "cat.txt": "green"}, []),
        ({"Cat.png": None, "metadata.csv": "file_name,text\ncat.png,red\nCat.png,green"}, ["green"]),
        ({"Cat.png": None, "cAt.png": None, "metadata.csv": "file_name,text\ncat.png,red\nCat.png,green"}, ["green"]),
    ],
)
def test_the_case_of_letters_counts_where_two_files_differ_only_so(
    tmp_path: Path, files: dict[str, bytes | str | None], expected: list[str]
) -> None:
    captions, _ = prepared(write(tmp_path / "images", files))
    assert sorted(captions.values()) == sorted([*expected, "good"])


def test_label_files_may_differ_from_the_image_in_the_case_of_letters(tmp_path: Path) -> None:
    files = {"Cat.JPG": None, "cat.txt": "red", "cat.CLS": "1", "good.cls": "2"}
    write(tmp_path / "images", files)
    prepare_folder(tmp_path / "images", tmp_path / "shards", shares=(1, 0, 0))
    shards = Shards(find_shards(str(tmp_path / "shards" / "train"), "train"))
    assert {key: shards.value(i, LABEL) for i, key in enumerate(shards.keys)} == {"Cat": 1, "good": 2}


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_names_match_in_any_unicode_normal_form(tmp_path: Path, stored: Any, listed: Any) -> None:
    name = unicodedata.normalize(stored, "grün.png")
    text = unicodedata.normalize(listed, "grün.txt")
    row = json.dumps({"file_name": unicodedata.normalize(listed, "schön/grün.png"), "text": "listed"})
    folder = write(tmp_path / "images", {name: None, text: "green", f"schön/{name}": None, "metadata.jsonl": row})
    captions, report = prepared(folder)
    assert sorted(captions.values()) == ["good", "green", "listed"]
    assert not report.left_out


@pytest.mark.parametrize("file", ["metadata.csv", "metadata.jsonl", "a.json"])
def test_the_caption_may_be_in_a_field_of_another_name(tmp_path: Path, file: str) -> None:
    row = '{"file_name": "a.png", "prompt": "red", "text": "other"}'
    content = "file_name,prompt,text\na.png,red,other" if file == "metadata.csv" else row
    folder = write(tmp_path / "images", {"a.png": None, file: content})
    assert prepared(folder, caption_field="prompt")[0] == {"good": "good", "a": "red"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "prompt": "a"}'}, "metadata without text"),
        ({"a.png": None, "metadata.csv": "file_name,prompt,more\na.png,red,1,2"}, "metadata without text"),
        ({"a.png": None, "a.json": '{"prompt": "a"}'}, "no caption"),
        ({"a.png": None, "a.json": "[1]"}, "no caption"),
        ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": ["a"]}'}, "caption is not text"),
        ({"a.png": None, "a.txt": b"caf\xe9"}, "caption is not UTF-8"),
        ({"a.png": None, "metadata.csv": b"file_name,text\na.png,caf\xe9\n"}, "caption is not UTF-8"),
        ({"a.png": None, "metadata.jsonl": b'{"file_name": "a.png", "text": "caf\xe9"}'}, "caption is not UTF-8"),
        ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": "\\ud83d"}'}, "caption is not UTF-8"),
        ({"a.png": None, "a.json": '{"text": "\\udc00 b"}'}, "caption is not UTF-8"),
        ({os.fsdecode(b"caf\xe9.png"): None, os.fsdecode(b"caf\xe9.txt"): "red"}, "name is not UTF-8"),
        ({os.fsdecode(b"caf\xe9.png"): None}, "name is not UTF-8"),
        ({os.fsdecode(b"caf\xe9/a.png"): None, os.fsdecode(b"caf\xe9/a.txt"): "red"}, "name is not UTF-8"),
    ],
)
def test_one_image_is_left_out_and_named_for_bytes_that_cannot_be_read(
    tmp_path: Path, files: dict[str, bytes | str | None], reason: str
) -> None:
    captions, report = prepared(write(tmp_path / "images", files))
    assert captions == {"good": "good"}
    ((found, names),) = report.left_out.items()
    assert found == reason
    assert len(names) == 1
    assert next(iter(names)).isprintable()


@pytest.mark.parametrize(
    "row",
    [
        b'{"file_name": "\\ud83d.png", "text": "a"}',
        b'{"file_name": "a\x00.png", "text": "a"}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"file_name": "", "text": "a"}',
        b'{"file_name": "/", "text": "a"}',
        b'{"file_name": "caf\xe9.png"}',
        b"3",
    ],
)
def test_one_row_of_metadata_that_cannot_be_read_is_named(tmp_path: Path, row: bytes) -> None:
    rows = b'{"file_name": "good.png", "text": "best"}\n\n' + row
    captions, report = prepared(write(tmp_path / "images", {"metadata.jsonl": rows}))
    assert captions == {"good": "best"}
    assert [list(names) for names in report.left_out.values()] == [["metadata.jsonl:3"]]


def test_one_row_of_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    table = f"file_name,text\na.png,{'x' * 200_000}\ngood.png,best\n"
    captions, report = prepared(write(tmp_path / "images", {"metadata.csv": table}))
    assert captions == {"good": "best"}
    assert list(report.left_out) == ["metadata without file_name and text"]


@given(
    st.binary(min_size=1, max_size=20).filter(lambda name: b"/" not in name and b"\0" not in name),
    st.binary(max_size=30),
)
def test_any_bytes_in_a_name_and_a_caption_end_in_a_set(
    tmp_path_factory: pytest.TempPathFactory, name: bytes, caption: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any") / "images"
    stem = "x" + os.fsdecode(name)
    captions, report = prepared(write(folder, {f"{stem}.png": None, f"{stem}.txt": caption}))
    assert captions["good"] == "good"
    used = {text for key, text in captions.items() if key != "good"}
    left_out = [each for names in report.left_out.values() for each in names]
    assert len(used) + len(left_out) == 1
    if used:
        assert used <= {
            caption.decode(errors="ignore").strip("\ufeff").strip(),
            caption.decode("utf-16", "ignore").strip(),
        }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_size": 0}, "the largest size of an image is 0 pixels; give at least 1"),
        ({"max_size": -3}, "the largest size of an image is -3 pixels"),
        ({"min_size": 0}, "the smallest size of an image is 0 pixels"),
        ({"shares": (float("nan"), 0, 0)}, "are not three non-negative numbers"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_folder(write(tmp_path / "images", {}), tmp_path / "shards", **settings)


def up(folder: Path) -> None:
    (folder / "up").symlink_to("..")


def to_itself(folder: Path) -> None:
    (folder / "again").symlink_to(folder)
    (folder / "loop").symlink_to("loop")


def between_two(folder: Path) -> None:
    for name, other in {"one": "two", "two": "one"}.items():
        (folder / name).mkdir()
        (folder / name / "link").symlink_to(folder / other)


@pytest.mark.parametrize("links", [up, to_itself, between_two])
def test_links_to_folders_are_followed_without_end(tmp_path: Path, links: Callable[[Path], None]) -> None:
    elsewhere = write(tmp_path / "elsewhere", {})
    folder = write(tmp_path / "images", {"deep/a.png": None, "deep/a.txt": "deep"})
    (folder / "linked").symlink_to(elsewhere)
    (folder / "twice").symlink_to(elsewhere)
    (folder / "0").symlink_to(folder / "deep")
    (folder / "file.png").symlink_to(elsewhere / "good.png")
    (folder / "file.txt").symlink_to(elsewhere / "good.txt")
    (folder / "broken.png").symlink_to("nowhere")
    links(folder)
    captions, report = prepared(folder)
    assert captions == {"good": "good", "deep/a": "deep", "linked/good": "good", "file": "good"}
    assert {name for names in report.left_out.values() for name in names} <= {"broken.png", "loop"}
    assert report.left_out["unreadable"]["broken.png"] == "broken link"


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "images", {"secret/a.png": None, "secret/a.txt": "a"})
    iterdir = Path.iterdir

    def refusing(path: Path) -> Any:  # as root, the permissions of a folder do not count
        if path.name == "secret":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    captions, report = prepared(folder)
    assert captions == {"good": "good"}
    assert report.left_out == {"unreadable": {"secret": "Permission denied"}}


def test_a_folder_in_the_set_of_which_the_images_are(tmp_path: Path) -> None:
    """The destination may contain the source, or be it."""
    folder = write(tmp_path / "raw", {})
    for destination in (tmp_path, folder):
        assert prepare_folder(folder, destination, shares=(1, 0, 0)).images["train"] == 1


def test_training_on_captions_refuses_a_set_without_any(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, f"data.train={tmp_path / 'labels.tar'}")
    write_shard(tmp_path / "captions.tar", [sample(0, labelled=True)])
    with tarfile.open(tmp_path / "captions.tar") as source, tarfile.open(tmp_path / "labels.tar", "w") as target:
        for info in source:
            if info.name in ("0000.png", "0000.cls"):
                target.addfile(info, source.extractfile(info))
    with pytest.raises(
        DataError, match=r"the tokenizer of stage clip needs captions, but the data has none; give each"
    ):
        train_stage(experiment, "clip")
    batch = experiment.data.open("train")[BatchIndices(np.array([0]))]
    with pytest.raises(DataError, match="the denoiser is conditioned on captions, but the data has none"):
        texts(batch, 0.0, None)
