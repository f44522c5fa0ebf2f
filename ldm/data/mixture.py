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
        self, parts: Sequence[Order], shares: Sequence[Fraction], places: int, seed: int, key: Sequence[int] = (1,)
    ):
        self._parts = parts
        self._schedule = Schedule(shares, Fraction(places), seed, key)

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


def order_of(samples: Samples, seed: int, shuffle_buffer: int | None) -> SampleOrder:
    """Return the order in which a training reads a set, in the proportions of its sources if there are several.

    Args:
        samples: the set.
        seed: seed of order and augmentation.
        shuffle_buffer: see :class:`~ldm.data.order.Order`; of several sources, each has its share of it.
    """
    if not samples.mixture:
        return Order(samples.lengths, seed, shuffle_buffer)
    ends = np.cumsum([source.files for source in samples.mixture]).tolist()
    samples_before = np.cumsum((0, *samples.lengths))
    parts = []
    shares = source_shares(samples)
    for number, (first, end) in enumerate(zip((0, *ends), ends, strict=False)):
        members = np.arange(samples_before[first], samples_before[end], dtype=np.uint32)
        buffer = shuffle_buffer and max(1, round(shuffle_buffer * shares[number]))
        parts.append(
            Order(samples.lengths[first:end], seed, buffer, members=members, first_shard=first, key=(number + 1,))
        )
    return MixedOrder(parts, shares, len(samples), seed)


def source_shares(samples: Samples) -> list[Fraction]:
    """Return the share of each source of a set in its training samples."""
    weights = [Fraction(str(source.weight)) for source in samples.mixture]
    return [weight / sum(weights) for weight in weights]
