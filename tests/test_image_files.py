"""What any viewer shows is read, wherever an image is read."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.data import BatchIndices, ShardsData
from ldm.data.folder import prepare_folder
from ldm.data.shards import Sample, Shards, find_shards, write_shard
from ldm.data.transforms import decode
from ldm.errors import DataError, SamplingError
from ldm.image_arguments import read_image
from ldm.image_files import ImageFileError, image_size, open_image
from ldm.image_io import open_argument, rgb
from ldm.modalities.edges import EDGES
from ldm.modalities.semantic import SEMANTIC
from tests.odd_images import IMAGE, LEFT_HALF_WHITE, PALETTE, SHOWN, WIDTH, differs, encoded, exif, with_chunk

TOLERANCE = 8.0
"""Mean difference that lossy formats and conversions of colours may make, in levels of 255."""


@pytest.mark.parametrize("name", SHOWN)
def test_what_any_viewer_shows_is_read(name: str, tmp_path: Path) -> None:
    data, expected = SHOWN[name]
    image = decode(data)
    assert image.mode == "RGB"
    assert differs(image, expected) < TOLERANCE
    assert image_size(data) == expected.size
    path = tmp_path / "image"
    path.write_bytes(data)
    assert differs(rgb(open_argument(path)), image) == 0
    if not open_image(data).has_transparency_data:  # which is no edge
        assert differs(EDGES.decode_file(path).convert("RGB"), image.convert("L").convert("RGB")) == 0


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
@pytest.mark.parametrize("image", [IMAGE, Image.new("RGB", IMAGE.size, "white")], ids=["smooth", "white"])
def test_a_cut_jpeg_is_refused_or_complete(image: Image.Image, options: dict[str, Any]) -> None:
    data = encoded(image, "JPEG", **options)
    whole, complete = open_image(data), 0
    for cut in range(1, len(data)):
        try:
            assert differs(open_image(data[:-cut]), whole) == 0, cut
            complete = cut
        except ImageFileError:
            pass
    assert complete >= 2 or options, "the marker at the end is needed"


@pytest.mark.parametrize("name", LEFT_HALF_WHITE)
@pytest.mark.parametrize("background", ["white", "#0000ff"])
def test_transparency_shows_the_background(name: str, background: str) -> None:
    pixels = np.asarray(decode(LEFT_HALF_WHITE[name], background=background))
    colour = {"white": [255, 255, 255], "#0000ff": [0, 0, 255]}[background]
    assert (pixels[:, : WIDTH // 2] == colour).all()
    assert (pixels[:, WIDTH // 2 :] != colour).any(-1).mean() > 0.9


def test_odd_images_are_prepared_and_trained_on(tmp_path: Path) -> None:
    suffixes = {"jpeg": "jfif", "png": "png", "tiff": "tif", "apng": "png"}
    for name, (data, _) in SHOWN.items():
        if name != "png-text-70-mb":
            suffix = suffixes.get(name.partition("-")[0], name.partition("-")[0])
            (tmp_path / f"{name}.{suffix}").write_bytes(data)
            (tmp_path / f"{name}.txt").write_text(name)
    report = prepare_folder(tmp_path, tmp_path / "shards", shares=(1, 0, 0))
    assert not report.left_out
    size = (36, WIDTH)
    samples = ShardsData(str(tmp_path / "shards" / "train"), size=size, sizes=True, workers=0).open("train")
    batch = samples[BatchIndices(np.arange(len(samples)))]
    assert len(samples) == len(SHOWN) - 1
    for name, image, original in zip(batch["text"], batch["image"], batch["original_size"], strict=True):
        expected = SHOWN[name][1]
        assert original == expected.size[::-1]
        if expected.size == (WIDTH, 36):
            shown = Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
            assert differs(shown, expected) < TOLERANCE


def test_foreign_shards_may_have_these_formats(tmp_path: Path) -> None:
    suffixes = ("heic", "jp2", "bmp", "tga")
    write_shard(tmp_path / "a.tar", (Sample(name, name, SHOWN[name][0], name) for name in suffixes))
    samples = ShardsData(str(tmp_path / "a.tar"), workers=0).open("train")
    assert samples[BatchIndices(np.arange(len(suffixes)))]["image"].shape == (len(suffixes), 3, 64, 64)


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_transparency_survives_the_preparation(tmp_path: Path, suffix: str) -> None:
    """The colour behind it is chosen when the data is read."""
    (tmp_path / f"a.{suffix}").write_bytes(LEFT_HALF_WHITE[suffix])
    (tmp_path / "a.txt").write_text("half")
    prepare_folder(tmp_path, tmp_path / "shards", shares=(1, 0, 0), max_size=20)
    data = Shards(find_shards(str(tmp_path / "shards" / "train"), "train")).image(0)
    assert (np.asarray(decode(data, background="black"))[:, :7] == 0).all()
    assert (np.asarray(decode(data))[:, :7] == 255).all()


def test_a_map_keeps_its_class_numbers() -> None:
    data = encoded(PALETTE, "PNG", exif=exif(0x11A, 2, b"abc\0", orientation=6))
    labels = np.asarray(SEMANTIC.decode(data))
    assert np.array_equal(labels, np.rot90(np.asarray(PALETTE), -1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 255.0, np.float32), r"has values from 255 to 255 in mode F; scale them to \[0, 1\]"),
        (np.full((4, 4), -0.1, np.float32), r"has values from -0\.1 to -0\.1 in mode F"),
        (np.full((4, 4), np.nan, np.float32), r"has values from nan to nan in mode F"),
        (np.full((4, 4), 70_000, np.int32), r"has values from 70000 to 70000 in mode I; scale them to \[0, 65535\]"),
    ],
)
def test_values_outside_of_the_range_of_the_format_are_refused(
    tmp_path: Path, values: np.ndarray, message: str
) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=message):
        decode(path.read_bytes())
    with pytest.raises(SamplingError, match=message):
        read_image(path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", with_chunk(b"zTXt", b"")[:20], b"\0\0\0\x18ftypheic"]
)
def test_what_is_no_image_is_refused_in_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    for read in (open_image, image_size, decode):
        with pytest.raises(DataError, match="cannot be read as an image") as error:
            read(data)
        assert "\n" not in str(error.value)
        assert "BytesIO" not in str(error.value)
    with pytest.raises(SamplingError, match=r"a\.png cannot be read as an image"):
        read_image(tmp_path / "a.png")


def test_a_missing_file_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match=r"none\.png cannot be read as an image \(No such file or directory\)"):
        read_image(tmp_path / "none.png")


def test_heic_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = SHOWN["heic"][0]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        patch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "HEIF"})
        patch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
        with pytest.raises(
            DataError, match=r"needs the package 'pillow-heif'; install it with pip install 'ldm\[heif\]'"
        ):
            decode(heic)
    assert decode(heic)


def test_a_large_jpeg_with_broken_metadata_is_decoded_small() -> None:
    file = io.BytesIO()
    SHOWN["bmp"][1].resize((1200, 720)).save(file, "JPEG")
    data = file.getvalue()
    broken = data[:2] + b"\xff\xee\0\x08Adobe\0" + data[2:]
    assert decode(broken, enough=(72, 72)).size == decode(data, enough=(72, 72)).size == (150, 90)
