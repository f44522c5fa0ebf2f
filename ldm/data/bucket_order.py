"""Order of samples in aspect buckets: batches of one shape, in which all samples are used equally often.

Each bucket has an endless sequence of its own samples, of which it takes a batch at a time: what is left of an epoch begins a
later batch, so no sample is dropped because its bucket is small. A schedule gives each batch to a bucket, in proportion to the
training samples of the bucket: after ``e`` epochs it has taken ``e`` times its samples, to half of a batch.

A batch is that of all ranks, so their number is free. If its size changes, each bucket continues at the sample that it has come
to, and the schedule where it was in the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from ldm.data.buckets import Shape
from ldm.data.mixture import mixed_order
from ldm.data.order import Order, SampleOrder
from ldm.data.samples import BatchIndices, Samples
from ldm.data.schedule import Schedule

History = Sequence[tuple[int, int]]
"""Positions from which batches have had a size, and that size on all ranks; the first position is 0."""


class BucketOrder:
    """Endless sequence of samples in batches of one shape.

    Positions count samples, so that those of a batch follow one another.

    Args:
        parts: the sequence of each bucket, in ascending order of their aspect ratio.
        shares: share of the training samples of each bucket; they add up to 1.
        shapes: shape of each bucket.
        samples: number of samples of an epoch.
        seed: seed of the schedule.
        history: sizes of the batches until now.
    """

    def __init__(
        self,
        parts: Sequence[SampleOrder],
        shares: Sequence[Fraction],
        shapes: Sequence[Shape],
        samples: int,
        seed: int,
        history: History,
    ):
        self._parts, self._shapes = parts, shapes

        def schedule() -> Schedule:
            advance = [Fraction(origin, self._batch) for origin in self._origins]
            return Schedule(shares, Fraction(samples, self._batch), seed, (2,), advance)

        self._start, self._batch = history[0]
        self._origins = [0] * len(parts)  # samples that each bucket had used at position _start
        self._schedule = schedule()
        for position, batch in history[1:]:
            batches = self._schedule.take((position - self._start) // self._batch, 0)[1]
            self._origins = [each + self._batch * n for each, n in zip(self._origins, batches, strict=True)]
            self._start, self._batch = position, batch
            self._schedule = schedule()

    def draw(self, start: int, count: int) -> BatchIndices:
        """Return the samples at positions ``start`` to ``start + count`` of the sequence, all of one batch, and its shape."""
        number, place = self._locate(start)
        return replace(self._parts[number].draw(place, count), shape=self._shapes[number])

    def candidates(self, position: int) -> int:
        _, place = self._locate(position)
        return sum(part.candidates(place) for part in self._parts)

    def replacement(self, position: int, attempt: int) -> int:
        """Return a sample of the same bucket or, if all of those are bad, of the next in aspect ratio."""
        number, place = self._locate(position)
        for part in sorted(range(len(self._parts)), key=lambda each: abs(each - number)):
            candidates = self._parts[part].candidates(place)
            if attempt < candidates:
                return self._parts[part].replacement(place, attempt)
            attempt -= candidates
        raise AssertionError("there are fewer candidates than attempts")

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the number of the bucket of a position, and the position in the sequence of the bucket."""
        batch, row = divmod(position - self._start, self._batch)
        (number,), before = self._schedule.take(batch, 1)
        return int(number), self._origins[number] + before[number] * self._batch + row


def order_of(samples: Samples, seed: int, shuffle_buffer: int | None, history: History) -> SampleOrder:
    """Return the order in which a training reads a set.

    Args:
        samples: the set; it may have several sources with weights, and buckets.
        seed: seed of order and augmentation.
        shuffle_buffer: see :class:`~ldm.data.order.Order`.
        history: sizes of the batches until now, on which the order of a set with buckets depends.
    """
    buckets = samples.buckets()
    if buckets is not None:
        numbers = [number for number, count in enumerate(buckets.counts()) if count]
        parts, shares = zip(*(mixed_order(samples, seed, shuffle_buffer, each) for each in numbers), strict=True)
        shapes = [buckets.shapes[number] for number in numbers]
        return BucketOrder(parts, shares, shapes, len(samples), seed, history)
    if samples.mixture:
        return mixed_order(samples, seed, shuffle_buffer)[0]
    return Order(samples.lengths, seed, shuffle_buffer)
