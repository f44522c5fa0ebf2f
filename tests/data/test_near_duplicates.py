from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.near_duplicates import MOST_BITS, SAME_COLOR, Look, look_of, near_pairs, originals
from tests.data.pictures import noise_picture


def clustered(seed: int, n: int, centers: int, flips: int) -> np.ndarray:
    """Hashes in clusters, each once."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, centers, np.uint64)[generator.integers(0, centers, n)]
    for _ in range(flips):
        flipped = np.uint64(1) << generator.integers(0, 64, n).astype(np.uint64)
        hashes = np.where(generator.random(n) < 0.7, hashes ^ flipped, hashes)
    return np.unique(hashes)


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 9), st.integers(0, 9), st.integers(0, MOST_BITS))
def test_near_pairs_are_those_of_a_comparison_of_all(
    seed: int, n: int, centers: int, flips: int, distance: int
) -> None:
    hashes = clustered(seed, n, centers, flips)
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(len(hashes)), 2)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance
    ]
    found = [tuple(pair) for pair in near_pairs(hashes, distance).tolist()]
    assert sorted(found) == expected  # and each once


@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(0, 6))
def test_no_two_kept_images_are_near_and_each_dropped_one_has_its_original(seed: int, n: int, distance: int) -> None:
    generator = np.random.default_rng(seed)
    hashes = generator.choice(clustered(seed, n, 4, 5), n)
    looks = [Look(int(each), (int(generator.integers(0, 60)), 0, 0), int(generator.integers(1, 4))) for each in hashes]

    def near(i: int, j: int) -> bool:
        a, b = looks[i], looks[j]
        return (a.hash ^ b.hash).bit_count() <= distance and abs(a.color[0] - b.color[0]) <= SAME_COLOR

    found = originals(looks, distance).tolist()
    kept = [i for i, original in enumerate(found) if i == original]
    assert not any(near(i, j) for i, j in itertools.combinations(kept, 2))
    for i, original in enumerate(found):
        assert original in kept
        assert i == original or (near(i, original) and looks[original].pixels >= looks[i].pixels)


@pytest.mark.parametrize("distance", [2, 4, 8])
def test_the_time_grows_far_slower_than_the_number_of_pairs(distance: int) -> None:
    def seconds(n: int) -> float:
        hashes = np.unique(np.random.default_rng(0).integers(0, 2**64, n, np.uint64))
        start = time.process_time()
        near_pairs(hashes, distance)
        return time.process_time() - start

    assert seconds(160_000 // distance) < 30 * max(seconds(16_000 // distance), 0.02)  # all pairs: 100 times


def test_copies_are_near_and_other_images_are_not() -> None:
    image = noise_picture(0, 6, 8).resize((640, 480), Image.Resampling.BICUBIC)
    other = noise_picture(1, 6, 8).resize((640, 480), Image.Resampling.BICUBIC)
    red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    images = [image.resize((160, 120)), image, other, red, blue, image.point(lambda value: 0.95 * value + 3)]
    assert originals([look_of(each) for each in images], 4).tolist() == [1, 1, 2, 3, 4, 1]
