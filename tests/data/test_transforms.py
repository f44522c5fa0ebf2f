from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.transforms import decode, shrink, to_tensor
from ldm.errors import DataError
from ldm.modalities.crop import Fit
from tests.data.pictures import encoded, noise_picture

sizes = st.integers(1, 40)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_come_back_as_they_were(file_format: str) -> None:
    picture = noise_picture(0, 7, 9)
    data = encoded(picture, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    assert np.array_equal(decode(data), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """What EXIF calls upright is what we get, whichever way the camera was held."""
    upright = noise_picture(1, 6, 10)
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encoded(stored, "PNG", exif=exif)), upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 2, 4))
    pixels = np.asarray(decode(encoded(picture.convert(mode), "PNG")))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 0).all()


def test_half_transparency_is_half_white() -> None:
    picture = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert np.asarray(decode(encoded(picture)))[0, 0].tolist() == [255, 127, 127]


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    values = np.array([[0, 257 * 100, 257 * 200, 65535]], np.uint16)
    pixels = np.asarray(decode(encoded(Image.fromarray(values), "PNG")))
    assert pixels[0, :, 0].tolist() == [0, 100, 200, 255]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    picture = noise_picture(2).convert(mode)
    data = encoded(picture, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(decode(data), picture.convert("RGB"))


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", encoded(noise_picture(0))[:200], encoded(noise_picture(0, 40, 40), "JPEG")[:300]],
)
def test_broken_pictures_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be read as an image"):
        decode(data)


def test_a_jpeg_decoded_small_is_the_same_picture() -> None:
    smooth = noise_picture(3, 8, 8).resize((512, 512), Image.Resampling.BICUBIC)
    data, fit = encoded(smooth, "JPEG", quality=95), Fit(32, 32)
    small = decode(data, enough=(64, 64))
    assert small.size == (64, 64)
    error = fit(small).astype(float) - fit(decode(data))
    assert np.abs(error).mean() < 1.0


@given(sizes, sizes, sizes, sizes, st.floats(0, 1), st.floats(0, 1))
def test_the_size_is_the_one_asked_for(h: int, w: int, height: int, width: int, y: float, x: float) -> None:
    assert Fit(height, width)(noise_picture(0, h, w), y, x).shape == (height, width, 3)


@given(sizes, sizes)
def test_a_picture_of_that_size_is_left_as_it_is(height: int, width: int) -> None:
    picture = noise_picture(0, height, width)
    assert np.array_equal(Fit(height, width)(picture), picture)


def test_the_cut_moves_from_one_end_to_the_other() -> None:
    picture = noise_picture(0, 8, 20)
    pixels = np.asarray(picture)
    for x, left in ((0.0, 0), (0.5, 6), (1.0, 12)):
        assert np.array_equal(Fit(8, 8)(picture, x=x), pixels[:, left : left + 8])


def test_scaling_down_averages() -> None:
    """A checkerboard of single pixels becomes grey; without antialiasing it would become black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    picture = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    assert np.abs(Fit(16, 16)(picture).astype(int) - 128).max() <= 8


@given(sizes, sizes, sizes)
def test_shrink_keeps_the_shape_and_bounds_the_longer_side(h: int, w: int, longest: int) -> None:
    small = shrink(noise_picture(0, h, w), longest)
    assert max(small.size) == min(longest, max(h, w))
    assert abs(small.height - h * max(small.size) / max(h, w)) <= 1


def test_tensors_span_minus_one_to_one_channels_last() -> None:
    pictures = np.array([0, 255, 51], np.uint8).reshape(1, 1, 3, 1).repeat(3, 3)
    tensor = to_tensor(pictures)
    assert tensor.shape == (1, 3, 1, 3)
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(tensor[0, :, 0], torch.tensor([-1.0, 1.0, -0.6]).expand(3, 3))
