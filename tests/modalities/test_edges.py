"""Edge maps: what the detector finds, and what becomes of maps in files, crops and calls of a pipeline."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import BatchIndices, ShardsData, TrainStream
from ldm.data.bad_samples import BAD
from ldm.data.folder import prepare_folder
from ldm.data.shards import Sample, write_shard
from ldm.errors import SamplingError
from ldm.modalities.edges import EDGES, detect_edges
from tests.data.pictures import encoded, noise_picture

SQUARE = torch.full((3, 12, 12), -1.0)
SQUARE[:, 3:9, 4:10] = 1.0


def test_the_edges_of_a_square_are_its_outline_one_pixel_wide() -> None:
    (edges,) = detect_edges(SQUARE[None])
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert not edges[5:7, 6:8].any(), "nothing within"
    assert not edges[[0, 1, -2, -1]].any(), "nothing far outside"
    for line in (edges[6], edges[:, 7]):
        assert line.sum() == 2, "a line across the square meets two sides"
    left, right = edges[6].nonzero().flatten().tolist()
    assert left in (3, 4)
    assert right in (9, 10)


@pytest.mark.parametrize("step", [(1, 0), (0, 1)])
def test_edges_lie_where_a_linear_step_is_steepest(step: tuple[int, int]) -> None:
    """Of a blurred step, whose gradient has one maximum, across rows or columns."""
    ramp = torch.tensor([-1.0, -1.0, -1.0, -0.8, 0.0, 0.8, 1.0, 1.0, 1.0])
    image = (ramp[:, None] if step[0] else ramp[None]).expand(3, 9, 9)
    (edges,) = detect_edges(image[None])
    expected = torch.zeros(9, 9)
    expected[(4, slice(None)) if step[0] else (slice(None), 4)] = 1
    assert torch.equal(edges, expected)


@pytest.mark.parametrize("rotation", range(4))
def test_diagonal_edges_are_a_line_of_two_pixels(rotation: int) -> None:
    """Both sides of an ideal diagonal step, whose gradients are equal."""
    image = torch.ones(20, 20).triu(1).expand(1, 3, 20, 20).rot90(rotation, (2, 3)) * 2 - 1
    edges = detect_edges(image)[0].rot90(-rotation)
    rows, columns = edges[5:15].nonzero(as_tuple=True)
    assert set((columns - rows - 5).tolist()) == {0, 1}
    assert len(rows) == 20


def test_colours_of_equal_brightness_have_an_edge() -> None:
    red = torch.tensor([0.5, -0.5, 0.0])  # its mean is that of the opposite colour
    image = red[None, :, None, None].expand(1, 3, 8, 8).clone()
    image[..., 4:] = -image[..., 4:]
    assert image.mean(1).unique().numel() == 1
    assert (detect_edges(image).sum(2) == 1).all()


def test_weak_edges_count_where_they_connect_to_strong_ones() -> None:
    """A step of 30 % of black to white on the left, of 15 % on the right; alone, the weak one is no edge."""
    height = torch.full((10,), 0.3)
    height[5:] = 0.15
    image = torch.zeros(1, 1, 10, 10)
    image[:, :, 5:] = 2 * height[:, None].T
    assert (detect_edges(image)[0].amax(0) == 1).all()
    weak = torch.zeros(1, 1, 10, 10)
    weak[:, :, 5:] = 2 * 0.15
    assert not detect_edges(weak).any()
    assert detect_edges(weak, low=0.1, high=0.1).any()


def test_an_image_has_the_same_edges_in_any_batch_and_under_autocast() -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = detect_edges(images)
    assert torch.equal(together, torch.cat([detect_edges(image[None]) for image in images]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(detect_edges(images), together)


MAP = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize("given", ["tensor", "array", "image", "rgb", "file"])
def test_a_map_is_given_as_an_image_a_file_or_a_tensor(tmp_path: Path, given: str) -> None:
    image = Image.fromarray((MAP * 255).astype(np.uint8))
    image.save(tmp_path / "map.png")
    values: dict[str, Any] = {
        "tensor": torch.from_numpy(MAP),
        "array": MAP,
        "image": image,
        "rgb": image.convert("RGB"),
    }
    value = values.get(given, tmp_path / "map.png")
    for entries in (EDGES.entries(value), EDGES.entries([value, None])):
        assert torch.equal(entries[0], torch.from_numpy(MAP))
        assert entries[1:] in ([], [None])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 3, 4, 4), r"an edge map is an image, or a tensor \[h, w\] in \[0, 1\], not \[3, 4, 4\]"),
        (torch.full((4, 4), -1.0), "from -1.0 to -1.0"),
        (torch.zeros(4, 4, dtype=torch.int64), "of torch.int64"),
        ("none.png", "the edge map none.png cannot be read"),
        ([], "the list of edges is empty"),
    ],
)
def test_what_is_not_a_map_is_one_sentence(given: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        EDGES.entries(given)


def edges_png(size: tuple[int, int]) -> bytes:
    """A white left half on black."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, : size[0] // 2] = 255
    return encoded(Image.fromarray(pixels))


def test_files_of_edges_are_cropped_and_mirrored_as_their_image(tmp_path: Path) -> None:
    def sample(i: int, size: tuple[int, int]) -> Sample:
        edges = edges_png(size)
        picture = encoded(Image.open(io.BytesIO(edges)).convert("RGB"))
        return Sample(f"{i}", "a", picture, "png", {"edges": edges})

    write_shard(tmp_path / "a.tar", [sample(0, (24, 16)), sample(1, (16, 32)), sample(2, (40, 40))])
    data = ShardsData(str(tmp_path / "a.tar"), size=16, workers=0, crop="random", flip=True).open("train")
    for batch in TrainStream(data, 3, seed=0, total_batches=3):
        assert batch["edges"].dtype == torch.float32
        torch.testing.assert_close(2 * batch["edges"] - 1, batch["image"][:, 0], atol=1e-6, rtol=0)


def test_a_folder_passes_edges_on_and_names_those_that_do_not_fit(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, size in (("good", (8, 8)), ("small", (4, 8))):
        (source / f"{name}.png").write_bytes(encoded(noise_picture(0, 8, 8)))
        (source / f"{name}.txt").write_text("a caption")
        (source / f"{name}.edges.png").write_bytes(edges_png(size))
    report = prepare_folder(source, tmp_path / "shards", shares=(1, 0, 0))
    assert report.left_out == {"unusable annotation": {"small.png": "the map is 4 x 8, the image 8 x 8"}}
    batch = ShardsData(str(tmp_path / "shards" / "train"), size=8, workers=0).open("train")[BatchIndices(np.arange(1))]
    assert batch["edges"][0].tolist() == [[1.0] * 4 + [0.0] * 4] * 8


def test_a_file_that_is_not_an_image_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [Sample("0", "a", encoded(noise_picture(0)), "png", {"edges": b"no image"})])
    data = ShardsData(str(tmp_path / "a.tar"), size=4, workers=0).open("train")
    (bad,) = data[BatchIndices(np.arange(1))][BAD].values()
    assert (bad.key, bad.shard) == ("0", str(tmp_path / "a.tar"))
    assert bad.detail.startswith("the edge map cannot be read as an image")
