from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import Pipeline, editing
from ldm.errors import SamplingError
from ldm.image_arguments import listed_images, read_image, read_mask, signed_image
from ldm.modalities.edges import EDGES
from ldm.modalities.semantic import SEMANTIC
from tests.tiny import SIZE, tiny_model

SQUARE = np.zeros((SIZE, SIZE), np.uint8)
SQUARE[4:12, 4:12] = 255
PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def transparent(mode: str) -> Image.Image:
    """White strokes on a transparent ground."""
    strokes = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    strokes.paste("white", (4, 4, 12, 12))
    return strokes.convert(mode)


def palette() -> Image.Image:
    image = Image.fromarray((SQUARE == 0).astype(np.uint8))
    image = image.convert("P")
    image.putpalette([255, 255, 255, 255, 255, 255])
    image.info["transparency"] = 1
    return image


MASKS: dict[str, Any] = {
    "L": Image.fromarray(SQUARE),
    "1": Image.fromarray(SQUARE).convert("1"),
    "RGB": Image.fromarray(SQUARE).convert("RGB"),
    "RGBA": transparent("RGBA"),
    "LA": transparent("LA"),
    "PA": transparent("PA"),
    "P": palette(),
    "I;16": Image.fromarray(SQUARE.astype(np.uint16) * 257),
    "I": Image.fromarray(SQUARE.astype(np.int32)),
    "La": transparent("LA").convert("La"),
    "I to 65535": Image.fromarray(SQUARE.astype(np.int32) * 257),
    "F": Image.fromarray(SQUARE.astype(np.float32) / 255),
    "bool": SQUARE > 0,
    "uint8": SQUARE,
    "uint16": SQUARE.astype(np.uint16) * 257,
    "int64": SQUARE.astype(np.int64),
    "float64": SQUARE.astype(np.float64) / 255,
    "big-endian": (SQUARE / 255).astype(">f4"),
    "[h w 1]": SQUARE[..., None],
    "[h w 3]": np.repeat(SQUARE[..., None], 3, 2),
    "[h w 4]": np.asarray(transparent("RGBA")),
    "tensor of bool": torch.from_numpy(SQUARE) > 0,
    "tensor [1 h w]": torch.from_numpy(SQUARE / 255)[None],
    "tensor of bfloat16": torch.from_numpy(SQUARE / 255).bfloat16(),
    "tensor [3 h w]": torch.from_numpy(SQUARE).expand(3, -1, -1),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_selects_the_same_pixels_in_every_form(mask: Any) -> None:
    assert torch.equal(read_mask(mask), torch.from_numpy(SQUARE) / 255)


@pytest.mark.parametrize("form", ["L", "1", "RGB", "RGBA", "LA", "PA", "P", "I;16"])
def test_a_mask_file_selects_the_same_pixels(form: str, tmp_path: Path) -> None:
    name = tmp_path / f"mask.{'tif' if form == 'PA' else 'png'}"
    MASKS["LA" if form == "PA" else form].save(name)
    assert torch.equal(read_mask(name), torch.from_numpy(SQUARE) / 255)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (SQUARE.astype(np.float32), r"values from 0 to 255 in float32; scale them to \[0, 1\]"),
        (Image.fromarray(SQUARE.astype(np.float32)), r"values from 0 to 255 in float32; scale them to \[0, 1\]"),
        (np.full((4, 4), np.nan), "values from nan to nan"),
        (-SQUARE.astype(np.int32), "values from -255 to 0"),
        (SQUARE // 255, "integers from 0 to 1, though white is 255"),
        (Image.fromarray(SQUARE // 255), "integers from 0 to 1, though white is 255"),
        (torch.zeros(8), r"has the shape \[8\]"),
        (np.zeros((0, 4)), r"has the shape \[0, 4\]"),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 100)), "black wherever it is not transparent"),
        (3, "not int"),
        (np.array(["a"]), "give a tensor or an array of numbers"),
    ],
)
def test_a_mask_outside_of_its_range_is_refused_in_a_sentence(mask: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        read_mask(mask)


@pytest.mark.parametrize(
    "make",
    [
        lambda pixels: pixels,
        lambda pixels: pixels / 255,
        lambda pixels: (pixels / 255).astype(np.float32),
        lambda pixels: pixels.astype(np.uint16) * 257,
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        lambda pixels: np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
    ],
)
def test_an_image_is_the_same_in_every_form(make: Callable[[np.ndarray], Any]) -> None:
    expected = read_image(Image.fromarray(PIXELS))
    torch.testing.assert_close(read_image(make(PIXELS)), expected, atol=1e-7, rtol=0)
    if not isinstance(make(PIXELS), torch.Tensor):
        torch.testing.assert_close(signed_image(make(PIXELS)), 2 * expected - 1, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", [str, Path, PurePath, Path.read_bytes, Path.open, io.BytesIO])
def test_image_files_are_read_from_names_contents_and_open_files(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    given = path.open("rb") if form is Path.open else form(path) if form is not io.BytesIO else form()
    if isinstance(given, io.BytesIO):  # now at its end
        Image.fromarray(PIXELS).save(given, "PNG")
    assert torch.equal(read_image(given), read_image(Image.fromarray(PIXELS)))
    assert torch.equal(read_mask(given), read_mask(Image.fromarray(PIXELS)))
    assert len(listed_images(given)) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), r"values from 0 to 255 in float32; scale them to \[0, 1\]"),
        (PIXELS.astype(np.int64), "is of int64, whose range is not defined"),
        (2 * torch.rand(3, 4, 4) - 1.5, "values from -"),
        (np.full((4, 4, 3), np.inf), "values from inf"),
        (np.zeros((3, 16, 16)), r"has the shape \[3, 16, 16\]"),
        (Image.fromarray(SQUARE.astype(np.int32)), "values from 0 to 255 in mode I, where white is 65535; convert it"),
        (Image.new("RGB", (0, 4)), "the image has no pixels"),
        (b"not an image", "the content of the file cannot be read as an image"),
        ({"image": PIXELS}, "not dict"),
    ],
)
def test_an_image_outside_of_its_range_is_refused_in_a_sentence(image: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        read_image(image)
    with pytest.raises(SamplingError, match="scale or clamp it"):
        signed_image(2 * torch.ones(3, 4, 4))


def test_editing_takes_arrays_and_tensors_for_images_and_masks() -> None:
    pipe, given = Pipeline(tiny_model()), {"num_inference_steps": 2, "seed": 1, "progress": False}
    expected = editing.inpaint(pipe, "a red apple", Image.fromarray(PIXELS), Image.fromarray(SQUARE), **given)[0]
    chosen = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for image, mask in (
        (PIXELS, SQUARE > 0),
        (chosen, MASKS["RGBA"]),
        (chosen[None] / 255, torch.from_numpy(SQUARE)[None, None]),
    ):
        assert editing.inpaint(pipe, "a red apple", image, mask, **given)[0].tobytes() == expected.tobytes()
    rows = pipe("a red apple", output_type="np", num_images_per_prompt=2, **given)
    assert len(editing.image_to_image(pipe, "a red apple", rows, 0.5, **given)) == 2


def test_a_transparent_edge_map_has_no_edges_where_it_is_transparent(tmp_path: Path) -> None:
    transparent("RGBA").save(tmp_path / "edges.png")
    expected = torch.from_numpy(SQUARE) / 255
    for given in (transparent("LA"), tmp_path / "edges.png", MASKS["I"], MASKS["F"]):
        assert torch.equal(EDGES.entry(given), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, ">i4"])
def test_a_semantic_map_is_of_any_integers(dtype: Any) -> None:
    labels = (SQUARE // 255).astype(dtype)
    assert SEMANTIC.entry(labels).tolist() == labels.tolist()
    with pytest.raises(SamplingError, match="of integers, not"):
        SEMANTIC.entry(torch.zeros(4, 4, dtype=torch.bfloat16))
