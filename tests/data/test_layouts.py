"""Boxes and semantic maps: they stay where their image shows it, however that is cut and mirrored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import BatchIndices, ShardsData, TrainStream
from ldm.data.bad_samples import BAD, Reason
from ldm.data.latents import cache_latents
from ldm.data.shards import Sample, Shards, write_shard
from ldm.data.transforms import decode
from ldm.errors import DataError
from ldm.image_files import image_size
from ldm.modalities.boxes import BOXES
from ldm.modalities.semantic import SEMANTIC
from ldm.vae import IdentityConfig
from tests.data.pictures import encoded, sample

WHITE, N = 255, 12


def write_spots(path: Path) -> None:
    """Pictures of several shapes with a white rectangle, its box, and its map: 1 where it is white."""
    samples = []
    for i in range(N):
        generator = np.random.default_rng(i)
        width, height = generator.integers(40, 80, 2).tolist()
        x0, y0 = (int(side * generator.uniform(0.2, 0.4)) for side in (width, height))
        x1, y1 = (int(side * generator.uniform(0.6, 0.8)) for side in (width, height))
        pixels = np.zeros((height, width), np.uint8)
        pixels[y0:y1, x0:x1] = WHITE
        box = (i % 3, x0 / width, y0 / height, x1 / width, y1 / height)
        labels = encoded(Image.fromarray(pixels // WHITE))
        picture = encoded(Image.fromarray(pixels).convert("RGB"))
        samples.append(Sample(f"{i}", "a spot", picture, "png", {"boxes": [box], "semantic": labels}))
    write_shard(path, samples)


@pytest.mark.parametrize(
    "settings", [{}, {"flip": True}, {"crop": "random", "flip": True}, {"cache": "ram", "flip": True}]
)
def test_boxes_and_maps_lie_where_the_picture_shows_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_spots(tmp_path / "a.tar")
    data = ShardsData(str(tmp_path / "a.tar"), size=(32, 24), workers=0, **settings)
    mirrored = 0
    plain = data.open("train")[BatchIndices(np.arange(N))]
    for batch in TrainStream(data.open("train"), N, seed=0, total_batches=3):
        assert batch["semantic"].dtype == torch.int64
        white = batch["image"][:, 0] > 0
        assert (white == (batch["semantic"] == 1)).float().mean() > 0.97  # but for the soft edges
        for i, ((label, x0, y0, x1, y1),) in enumerate(batch["boxes"]):
            rows, columns = np.nonzero(white[i].numpy())
            seen = [columns.min() / 24, rows.min() / 32, (columns.max() + 1) / 24, (rows.max() + 1) / 32]
            assert np.abs(np.subtract(seen, [x0, y0, x1, y1])).max() < 0.05
            assert label == int(batch["key"][i]) % 3
            mirrored += abs(x0 - plain["boxes"][int(batch["key"][i])][0][1]) > 0.02
    assert bool(mirrored) == bool(settings)


@pytest.mark.parametrize(
    "settings", [{}, {"flip": True}, {"crop": "random", "flip": True}, {"cache": "ram", "flip": True}]
)
def test_sizes_tell_of_what_and_from_where_a_picture_was_cut(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Cut there, the resized original, mirrored or not, is the image."""
    write_spots(tmp_path / "a.tar")
    data = ShardsData(str(tmp_path / "a.tar"), size=(32, 24), workers=0, sizes=True, **settings)
    originals = {key: decode(picture) for key, picture in pictures_of(tmp_path / "a.tar")}
    for batch in TrainStream(data.open("train"), N, seed=0, total_batches=3):
        sizes, cuts = batch["original_size"], batch["crops_coords_top_left"]
        for key, image, (height, width), (top, left) in zip(batch["key"], batch["image"], sizes, cuts, strict=True):
            original = originals[key]
            assert (original.height, original.width) == (height, width)
            scale = max(32 / height, 24 / width)
            resized = original.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
            both = [resized, resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
            cut = [np.asarray(each.crop((left, top, left + 24, top + 32)))[..., 0] / 127.5 - 1 for each in both]
            assert min(np.abs(each - image[0].numpy()).mean() for each in cut) < 0.1
    assert (
        "original_size" not in ShardsData(str(tmp_path / "a.tar"), workers=0).open("train")[BatchIndices(np.arange(2))]
    )


def pictures_of(path: Path) -> list[tuple[str, bytes]]:
    shards = Shards([path])
    return [(key, shards.image(i)) for i, key in enumerate(shards.keys)]


def test_a_box_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    picture = encoded(Image.new("RGB", (40, 10)))
    boxes = [(0, 0.0, 0.0, 0.2, 1.0), (1, 0.3, 0.0, 0.5, 1.0)]  # the middle quarter is kept
    write_shard(tmp_path / "a.tar", [Sample("a", "wide", picture, "png", {"boxes": boxes})])
    batch = ShardsData(str(tmp_path / "a.tar"), size=10, workers=0).open("train")[BatchIndices(np.arange(1))]
    (kept,) = batch["boxes"]
    assert kept == [(1, 0.0, 0.0, 0.5, 1.0)]


def test_cached_latents_come_with_boxes_maps_and_sizes(tmp_path: Path) -> None:
    write_spots(tmp_path / "a.tar")
    samples = ShardsData(str(tmp_path / "a.tar"), size=16, workers=0, sizes=True).open("train")
    draw = BatchIndices(np.array([3, 1]), np.zeros((2, 3), np.float32))
    cached = cache_latents(IdentityConfig().build(), "none", samples, tmp_path / "latents")[draw]
    expected = samples[BatchIndices(np.array([3, 1]))]
    for name in ("boxes", "original_size", "crops_coords_top_left"):
        assert cached[name] == expected[name]
    assert torch.equal(cached["semantic"], expected["semantic"])
    assert "image" not in cached


def test_the_size_of_a_picture_is_that_of_its_decoding(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 4))
    turned = picture.getexif()
    turned[0x0112] = 6  # by a quarter
    assert image_size(encoded(picture, "JPEG")) == (6, 4)
    assert image_size(encoded(picture, "JPEG", exif=turned)) == (4, 6)
    with pytest.raises(DataError, match="cannot be read as an image"):
        image_size(b"no image")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [(0, 0, 0, 1, 1)]}, r"has boxes \(\.boxes\.json\), but '0001' in .* has none"),
        (
            {"semantic": encoded(Image.new("L", (4, 4)))},
            r"has a semantic map \(\.semantic\.png\), but '0001' in .* has none",
        ),
    ],
)
def test_all_samples_have_them_or_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    first = sample(0)
    samples = [Sample(first.key, first.text, first.image, first.suffix, changes), sample(1)]
    write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match=message):
        Shards([tmp_path / "a.tar"])


@pytest.mark.parametrize(
    ("boxes", "semantic", "message"),
    [
        (b"[[0, 2, 0, 3, 1]]", encoded(Image.new("L", (4, 4))), "^the boxes are not a list of"),
        (b"[[0", encoded(Image.new("L", (4, 4))), "^the boxes are not valid JSON"),
        (
            b"[]",
            encoded(Image.new("RGB", (4, 4))),
            "^the semantic map is not a semantic map: it has several",
        ),
        (b"[]", b"no image", "^the semantic map cannot be read as a map"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, boxes: bytes, semantic: bytes, message: str) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        picture = encoded(Image.new("RGB", (4, 4)))
        writer.write({"__key__": "0", "png": picture, "txt": "a", "semantic.png": semantic, "boxes.json": boxes})
    for cache in ("none", "ram"):
        samples = ShardsData(str(tmp_path / "a.tar"), size=4, cache=cache, workers=0).open("train")
        (bad,) = samples[BatchIndices(np.arange(1))].pop(BAD).values()
        assert (bad.reason, bad.key, bad.index) == (Reason.MALFORMED_ANNOTATION, "0", 0)
        assert re.search(message, bad.detail)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    boxes, labels = [(2, 0.1, 0.2, 0.3, 0.4), (0, 0.0, 0.0, 1.0, 1.0)], encoded(Image.new("P", (4, 4), 3))
    write_shard(
        tmp_path / "a.tar",
        [Sample("0", "a", encoded(Image.new("RGB", (4, 4))), "png", {"boxes": boxes, "semantic": labels})],
    )
    shards = Shards([tmp_path / "a.tar"])
    assert set(shards.modalities) == {"text", "boxes", "semantic"}
    assert shards.value(0, BOXES) == boxes
    assert shards.encoded(0, SEMANTIC) == labels
