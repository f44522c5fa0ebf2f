"""Near duplicates among images: those with almost the same perceptual hash and about the same color.

The hash is pHash: 64 signs of low frequencies of the image in gray (ImageHash). Copies that were scaled or compressed again
differ in few bits. The hash sees no color, so the mean colors are compared too: flags, icons in several colors, and plain areas
stay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.errors import DataError, missing_extra

if TYPE_CHECKING:
    from PIL import Image

BITS = 64
MOST_BITS = 10
"""Greatest distance of hashes: beyond it, images that have nothing in common are near each other, and the search is slow."""

BACKGROUND = (128, 128, 128)
"""Color behind transparency when images are compared, on which both white and black icons are visible."""

SAME_COLOR = 24
"""Greatest difference of the mean of a color channel, in [0, 255]."""

_SORTED_PER_PAIR = 15  # pairs that are compared in the time in which a number is sorted


@dataclass(frozen=True)
class Look:
    """Appearance of an image in a few bytes.

    Attributes:
        hash: 64 bits of pHash.
        color: mean of red, green and blue, in [0, 255].
        pixels: width times height.
    """

    hash: int
    color: tuple[int, int, int]
    pixels: int


def check_distance(distance: int | None) -> None:
    """Raise an error if near duplicates cannot be found by this number of bits; None finds none.

    Raises:
        DataError: there cannot be so many.
        MissingExtraError: ImageHash is not installed.
    """
    if distance is not None:
        if not 0 <= distance <= MOST_BITS:
            raise DataError(
                f"near duplicates are to differ in up to {distance} bits; give a number from 0 to {MOST_BITS}."
            )
        _imagehash()


def _imagehash() -> Any:
    try:
        import imagehash
    except ImportError:
        raise missing_extra("ImageHash", "finding near duplicates", "duplicates") from None
    return imagehash


def look_of(image: Image.Image) -> Look:
    """Return the appearance of an RGB image, whose transparent parts have the color ``BACKGROUND``."""
    from PIL import Image

    bits = np.packbits(_imagehash().phash(image).hash)
    red, green, blue = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))  # type: ignore[misc]
    return Look(int.from_bytes(bits.tobytes(), "big"), (red, green, blue), image.width * image.height)


def originals(looks: list[Look], distance: int) -> np.ndarray:
    """Return int64 ``[n]``: for each image itself, or the one of which it is a near duplicate and which is kept.

    The images are visited from the largest to the smallest, equal ones in their order. One that is near to an image that is kept
    is its duplicate (of several, that of the first in this order); so no two that are kept are near each other.

    Args:
        looks: the images.
        distance: greatest number of bits in which the hashes of near images differ, up to ``MOST_BITS``.
    """
    n = len(looks)
    order = np.argsort(np.array([-look.pixels for look in looks], np.int64), kind="stable")
    colors = np.array([look.color for look in looks], np.int16).reshape(n, 3)
    hashes, group = np.unique(np.array([look.hash for look in looks], np.uint64), return_inverse=True)
    pairs = near_pairs(hashes, distance)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.argsort(both[:, 0], kind="stable")]
    starts = np.searchsorted(both[:, 0], np.arange(len(hashes) + 1))
    alone = (np.bincount(group, minlength=len(hashes)) == 1) & (np.diff(starts) == 0)
    found, kept = np.arange(n), dict[int, list[int]]()  # kept ones by hash
    for i in order[~alone[group[order]]].tolist():
        own = int(group[i])
        near = (own, *both[starts[own] : starts[own + 1], 1].tolist())
        candidates = np.array([each for one in near for each in kept.get(one, ())], np.int64)
        candidates = candidates[(np.abs(colors[candidates] - colors[i]) <= SAME_COLOR).all(axis=1)]
        if len(candidates):
            found[i] = min(candidates.tolist(), key=lambda each: (-looks[each].pixels, each))
        else:
            kept.setdefault(own, []).append(i)
    return found


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Return int64 ``[m 2]``, the pairs i < j of different hashes that differ in at most ``distance`` bits.

    Of ``distance + k`` pieces of the hash, at least ``k`` are equal in such a pair. For each choice of ``k`` pieces, the hashes
    are sorted by those, and compared where they are equal. ``k`` is chosen so that sorting and comparing take the least time
    together; n log n times a factor, as long as hashes are spread evenly.

    Args:
        hashes: uint64 ``[n]``, each once.
        distance: number of bits.
    """
    found = [np.zeros((0, 2), np.int64)]
    if distance > 0:
        pieces, chosen = _pieces(len(hashes), distance)
        for choice in itertools.combinations(range(len(pieces)), chosen):
            found += _pairs_of_choice(hashes, distance, pieces, choice)
    return np.concatenate(found)


def _pieces(n: int, distance: int) -> tuple[list[int], int]:
    """Return masks of the pieces of a hash, and how many of them are compared at a time."""

    def cost(k: int) -> float:
        tables, keys = math.comb(distance + k, k), 2.0 ** (BITS * k / (distance + k))
        return tables * (_SORTED_PER_PAIR * n + n * n / 2 / keys)

    chosen = min(range(1, 7), key=cost)
    count = distance + chosen
    edges = [BITS * i // count for i in range(count + 1)]
    return [(1 << end) - (1 << start) for start, end in itertools.pairwise(edges)], chosen


def _pairs_of_choice(
    hashes: np.ndarray, distance: int, pieces: list[int], choice: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Yield the near pairs that are equal in the pieces of this choice and in no choice before it."""
    keys = hashes & np.uint64(sum(pieces[each] for each in choice))
    order = np.argsort(keys, kind="stable")
    keys, ordered = keys[order], hashes[order]
    others = [np.uint64(pieces[each]) for each in range(choice[-1]) if each not in choice]
    first = np.arange(len(keys))
    for step in range(1, len(keys)):
        first = first[first + step < len(keys)]
        first = first[keys[first] == keys[first + step]]
        if not len(first):
            return
        differing = ordered[first] ^ ordered[first + step]
        near = np.bitwise_count(differing) <= distance
        for mask in others:
            near[near] = (differing[near] & mask) != 0
        pairs = np.stack([order[first[near]], order[first[near] + step]], axis=1)
        if len(pairs):
            yield np.sort(pairs, axis=1)
