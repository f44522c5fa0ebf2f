"""Mixtures of sources with weights.

Each source has an endless sequence of its own samples (:class:`~ldm.data.order.Order`), so that all of them are used equally
often. A schedule gives each position of a training to a source, in the proportions of the weights, and the position takes the
next sample of its source.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ldm.config import config_field
from ldm.data.order import Order, SampleOrder
from ldm.data.samples import BatchIndices, Samples
from ldm.data.schedule import Schedule
from ldm.errors import ConfigError


@dataclass(frozen=True)
class WeightedSource:
    """Shards, and the part of the training samples that come from them."""

    source: str | tuple[str, ...] = config_field(help="Shards, written as data.train.", changeable=True, path=True)
    weight: float = config_field(
        1.0,
        "Weight of the source: of all training samples, weight / (sum of the weights) come from it, however many it has.",
    )

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"weight must be positive, not {self.weight}.")


class MixedOrder:
    """Endless sequence of samples from several others, each of which is read in its own order.

    Args:
        parts: the sequences.
        shares: share of each; they add up to 1.
        places: number of positions of an epoch, after each of which the shares are exact.
        seed, key: see :class:`~ldm.data.schedule.Schedule`.
    """

    def __init__(
        self, parts: Sequence[Order], shares: Sequence[Fraction], places: Fraction, seed: int, key: Sequence[int]
    ):
        self._parts = parts
        self._schedule = Schedule(shares, places, seed, key)

    def draw(self, start: int, count: int) -> BatchIndices:
        """Return the samples at positions ``start`` to ``start + count`` of the sequence."""
        groups, before = self._schedule.take(start, count)
        index, jitter = np.empty(count, np.int64), np.empty((count, 3), np.float32)
        for number in np.unique(groups).tolist():
            rows = np.flatnonzero(groups == number)
            draw = self._parts[number].draw(before[number], len(rows))
            index[rows], jitter[rows] = draw.index, draw.jitter
        shards = (part.ahead(place) for part, place in zip(self._parts, before, strict=True))
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*shards))
        return BatchIndices(index, jitter, ahead=tuple(shard for shard in in_turn if shard is not None))

    def candidates(self, position: int) -> int:
        part, place = self._locate(position)
        return part.candidates(place)

    def replacement(self, position: int, attempt: int) -> int:
        part, place = self._locate(position)
        return part.replacement(place, attempt)

    def _locate(self, position: int) -> tuple[Order, int]:
        """Return the sequence that a position is taken from, and the position in it."""
        (number,), before = self._schedule.take(position, 1)
        return self._parts[number], before[number]


def mixed_order(
    samples: Samples, seed: int, shuffle_buffer: int | None, bucket: int | None = None
) -> tuple[SampleOrder, Fraction]:
    """Return an order of samples in the proportions of their sources, and the share that they have in a training.

    Args:
        samples: the set.
        seed: seed of order and augmentation.
        shuffle_buffer: see :class:`~ldm.data.order.Order`; each part of the set has its share of it.
        bucket: number of the bucket whose samples are ordered; None: all samples.
    """
    of_bucket = () if bucket is None else (bucket + 1,)
    buckets = None if bucket is None else samples.buckets()
    numbers = np.arange(len(samples)) if bucket is None or buckets is None else buckets.members(bucket)
    starts = np.cumsum((0, *samples.lengths))
    parts, shares, first = [], [], 0
    for number, share in enumerate(source_shares(samples)):
        end = first + samples.mixture[number].files if samples.mixture else len(samples.lengths)
        low, high = np.searchsorted(numbers, (starts[first], starts[end]))
        if low < high:
            own = numbers[low:high].astype(np.uint32)
            share *= Fraction(len(own), int(starts[end] - starts[first]))
            lengths = np.diff(np.searchsorted(own, starts[first : end + 1])).tolist()
            buffer = shuffle_buffer and max(1, round(shuffle_buffer * share))
            key = (number + 1, *of_bucket)
            parts.append(Order(lengths, seed, buffer, members=own, first_shard=first, key=key))
            shares.append(share)
        first = end
    total = sum(shares, Fraction(0))
    if len(parts) == 1:
        return parts[0], total
    places = len(samples) * total
    return MixedOrder(parts, [share / total for share in shares], places, seed, (1, *of_bucket)), total


def source_sizes(samples: Samples) -> list[int]:
    """Return the number of samples of each source of a set; of all, if it has a single one."""
    starts = np.cumsum((0, *samples.lengths))
    ends = np.cumsum([source.files for source in samples.mixture] or [len(samples.lengths)])
    sizes: list[int] = np.diff(starts[[0, *ends]]).tolist()
    return sizes


def source_shares(samples: Samples) -> list[Fraction]:
    """Return the share of each source of a set in its training samples."""
    weights = [Fraction(str(source.weight)) for source in samples.mixture] or [Fraction(1)]
    return [weight / sum(weights) for weight in weights]
