"""Ways to fit an image into another aspect ratio: everything that belongs to an image follows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data import BatchIndices, ShardsData
from ldm.data.folder import prepare_folder
from ldm.data.latents import cache_latents
from ldm.data.preparation_report import cropped_area
from ldm.data.shards import Sample, write_shard
from ldm.errors import ConfigError
from ldm.modalities.crop import FITS, Fit
from ldm.vae import IdentityConfig
from tests.data.pictures import encoded

sides = st.integers(8, 60)
positions = st.floats(0, 1)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@given(sides, sides, sides, sides, positions, positions)
def test_a_padded_image_is_complete_and_touches_two_opposite_sides(
    h: int, w: int, height: int, width: int, y: float, x: float
) -> None:
    fit = FITS["pad"](height, width, BLUE)
    pixels = fit(Image.new("RGB", (w, h), RED), y, x)
    rows, columns = np.nonzero((pixels == RED).all(-1))
    box = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (box == RED).all()
    assert (pixels == BLUE).all(-1).sum() == height * width - len(rows)
    assert box.shape[0] == height or box.shape[1] == width
    scale = max(h / height, w / width)
    assert abs(box.shape[0] - h / scale) <= 1
    assert abs(box.shape[1] - w / scale) <= 1
    if y == x == 0:
        assert (rows.min(), columns.min()) == (0, 0)


@given(sides, sides, sides, sides)
def test_a_stretched_image_is_complete_and_fills_the_frame(h: int, w: int, height: int, width: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8))
    expected = image.resize((width, height), Image.Resampling.LANCZOS)
    assert np.array_equal(FITS["stretch"](height, width)(image), expected)


@given(st.sampled_from(sorted(FITS)), sides, st.integers(1, 3))
def test_all_fits_agree_on_an_image_of_the_aspect_ratio_of_the_frame(name: str, side: int, factor: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side * factor, side, 3), np.uint8))
    assert np.array_equal(FITS[name](8 * factor, 8)(image), Fit(8 * factor, 8)(image))


def write_spot(path: Path, width: int, height: int) -> None:
    """A grey image with a white rectangle, its box, its map and its edge map, which is white in the same place."""
    x0, y0, x1, y1 = width // 4, height // 4, width - width // 3, height - height // 3
    pixels = np.zeros((height, width), np.uint8)
    pixels[y0:y1, x0:x1] = 1
    maps = {name: encoded(Image.fromarray(pixels * value)) for name, value in {"semantic": 1, "edges": 255}.items()}
    box = (3, x0 / width, y0 / height, x1 / width, y1 / height)
    picture = encoded(Image.fromarray(127 + 128 * pixels).convert("RGB"))
    write_shard(path, [Sample("0", "a spot", picture, "png", {"boxes": [box], **maps})])


@settings(max_examples=60)
@given(st.sampled_from(sorted(FITS)), st.integers(24, 90), st.integers(24, 90), positions, positions, st.booleans())
def test_boxes_and_maps_follow_the_image(
    tmp_path_factory: pytest.TempPathFactory, fit: str, w: int, h: int, y: float, x: float, flip: bool
) -> None:
    path = tmp_path_factory.mktemp("spot") / "a.tar"
    write_spot(path, w, h)
    data = ShardsData(
        str(path),
        size=(32, 40),
        fit=fit,
        crop="random",
        flip=flip,
        pad_color=(0, 0, 0),
        sizes=True,
        workers=0,  # type: ignore[arg-type]
    )
    batch = data.open("train")[BatchIndices(np.array([0]), np.array([[y, x, 0.2]], np.float32))]
    white = batch["image"][0, 0] > 0.5
    assert (white == (batch["semantic"][0] == 1)).float().mean() > 0.9
    assert (white == (batch["edges"][0] > 0.5)).float().mean() > 0.9
    for label, x0, y0, x1, y1 in batch["boxes"][0]:
        rows, columns = np.nonzero(white.numpy())
        seen = [columns.min() / 40, rows.min() / 32, (columns.max() + 1) / 40, (rows.max() + 1) / 32]
        assert label == 3
        assert np.abs(np.subtract(seen, [x0, y0, x1, y1])).max() < 0.08
    border = (batch["image"][0] == -1).all(0)
    assert (batch["semantic"][0][border] == 0).all()
    assert batch["original_size"] == [(h, w)]
    assert fit == "crop" or batch["crops_coords_top_left"] == [(0, 0)]


@pytest.mark.parametrize("fit", sorted(FITS))
def test_caches_hold_what_the_fit_shows(tmp_path: Path, fit: Any) -> None:
    write_spot(tmp_path / "a.tar", 60, 24)
    plain, cached = (
        ShardsData(str(tmp_path / "a.tar"), size=16, fit=fit, cache=cache, workers=0).open("train")  # type: ignore[arg-type]
        for cache in ("none", "ram")
    )
    draw = BatchIndices(np.array([0]))
    for name, value in plain[draw].items():
        assert (
            torch.equal(value, cached[draw][name]) if isinstance(value, torch.Tensor) else value == cached[draw][name]
        )
    latents = cache_latents(IdentityConfig().build(), "none", plain, tmp_path / "latents")[draw]
    assert torch.allclose(latents["mean"], plain[draw]["image"], atol=1e-3)
    assert torch.equal(latents["semantic"], plain[draw]["semantic"])


def test_latents_are_cached_again_for_another_fit_or_background(tmp_path: Path) -> None:
    write_spot(tmp_path / "a.tar", 60, 24)
    changes: list[dict[str, Any]] = [
        {},
        {"fit": "pad"},
        {"fit": "pad", "pad_color": "red"},
        {"fit": "stretch"},
        {"background": "black"},
    ]
    samples = [ShardsData(str(tmp_path / "a.tar"), size=16, workers=0, **change).open("train") for change in changes]
    assert len({each.fingerprint for each in samples}) == len(changes)
    assert samples[0].fingerprint.endswith("-16x16")  # as that of earlier versions


def test_borders_have_the_background_of_transparency_unless_they_have_their_own(tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    write_shard(tmp_path / "a.tar", [Sample("0", "nothing", encoded(hidden), "png")])

    def colors(**options: Any) -> list[list[int]]:
        data = ShardsData(str(tmp_path / "a.tar"), size=16, fit="pad", workers=0, **options)
        image = ((data.open("train")[BatchIndices(np.array([0]))]["image"][0] + 1) * 127.5).round()
        return [image[:, 0, 0].tolist(), image[:, 8, 8].tolist()]

    assert colors() == [[255, 255, 255]] * 2
    assert colors(background="lime") == [list(GREEN)] * 2
    assert colors(background=BLUE, pad_color="#ff0000") == [list(RED), list(BLUE)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "colourless"}, "background is 'colourless', which is not a color; give a name"),
        ({"pad_color": (0, 0, 256)}, r"pad_color is \[0, 0, 256\]; its numbers must be from 0 to 255"),
    ],
)
def test_colors_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardsData("a.tar", **options)


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=9), st.floats(0.2, 5))
def test_the_cropped_area_is_what_a_crop_cuts_off(ratios: list[float], target: float) -> None:
    def outside(ratio: float) -> float:
        left, top, right, bottom = Fit(1000, round(1000 * target)).window(round(1000 * ratio), 1000)
        return 1 - (right - left) * (bottom - top) / (round(1000 * ratio) * 1000)

    assert cropped_area(ratios, target) == pytest.approx(np.mean([outside(ratio) for ratio in ratios]), abs=0.01)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(20, 20), (20, 21)], None),
        (
            [(20, 30), (20, 31)],
            "would remove 34% of the area of the images; data.fit: pad (borders) or stretch (distorted) ",
        ),
        ([(20, 30), (20, 31)], "data.size: [height, width] in the ratio 3:2 all but 2%"),
        ([(10, 40), (40, 10)], "would remove 75% of the area of the images; data.fit: pad"),
    ],
)
def test_the_preparation_reports_what_cropping_would_remove(
    tmp_path: Path, sizes: list[tuple[int, int]], message: str | None
) -> None:
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a caption")
    report = prepare_folder(tmp_path, tmp_path / "shards", shares=(1, 0, 0))
    assert message in report.summary() if message else "cropping" not in report.summary()
    written = json.loads((tmp_path / "shards" / "report.json").read_text())["area_outside_of_square"]
    assert written == pytest.approx(cropped_area([w / h for w, h in sizes], 1), abs=1e-4)
