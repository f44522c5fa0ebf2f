"""Order of the samples of a set in training: a function of the seed and the position."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ldm.data.samples import BatchIndices

READ_AHEAD = 3
"""Number of shards that are copied to the cache before they are read."""

_SHUFFLED_AT_ONCE = 1 << 20  # samples

_STRIDE = 0.618  # of an epoch: multiples of the golden section are far from each other


class SampleOrder(Protocol):
    """Endless sequence of samples that can be read from any position on."""

    def draw(self, start: int, count: int) -> BatchIndices:
        """Return the samples at positions ``start`` to ``start + count`` of the sequence."""

    def candidates(self, position: int) -> int:
        """Return the number of different samples that a position can be given to, with its own."""

    def replacement(self, position: int, attempt: int) -> int:
        """Return the sample that is tried for a position after ``attempt`` bad ones, fewer than there are candidates."""


class Order:
    """Endless, shuffled sequence of the samples of a set, or of a part of it, epoch after epoch.

    Args:
        lengths: number of samples of each shard.
        seed: seed of the shuffling and the jitter.
        shuffle_buffer: None shuffles the complete set. A number keeps reading nearly sequential: shards come in
            random order, and samples are shuffled within blocks of that size.
        members: uint32 ``[n]``, numbers of the samples in ascending order, if they are only a part of the set.
        first_shard: number of the first of the shards.
        key: numbers from 1 that tell the parts of a set apart. Parts that share the first one read shards in the same order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        shuffle_buffer: int | None = None,
        *,
        members: np.ndarray | None = None,
        first_shard: int = 0,
        key: tuple[int, ...] = (),
    ):
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self._members, self._first_shard, self._key = members, first_shard, key
        self._starts = np.cumsum((0, *lengths))
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)  # two, since a batch may span two epochs
        buffer = shuffle_buffer or len(self)
        far = buffer if buffer < len(self) else max(1, round(_STRIDE * len(self)))
        self._stride = next(stride for stride in itertools.count(far) if math.gcd(stride, len(self)) == 1)

    def __len__(self) -> int:
        """Number of samples of an epoch."""
        return int(self._starts[-1])

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch in order, uint32 ``[n]``."""
        return self._epoch(epoch)[0]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, Any, np.ndarray]:
        """Return the permutation of an epoch, the state of the generator after it, and the order of the shards."""
        generator = np.random.default_rng([self.seed, epoch, *self._key])
        n, size = len(self), self.shuffle_buffer
        if size is None:
            order = np.arange(n, dtype=np.uint32)
            generator.shuffle(order)  # as generator.permutation(n), in half of the memory
            return order, generator.bit_generator.state, np.arange(0)
        shared = generator if len(self._key) < 2 else np.random.default_rng([self.seed, epoch, self._key[0]])
        shards = shared.permutation(len(self._starts) - 1)
        order = np.empty(n, np.uint32)  # first as the shards are read
        place = 0
        for first, end in zip(self._starts[shards], self._starts[shards + 1], strict=True):
            order[place : place + end - first] = np.arange(first, end, dtype=np.uint32)
            place += end - first
        blocks = max(1, _SHUFFLED_AT_ONCE // size)  # of the size of the buffer
        for start in range(0, n, blocks * size):
            part = order[start : start + blocks * size]
            whole = len(part) // size * size
            numbers = generator.random(len(part))
            rows = np.argsort(numbers[:whole].reshape(-1, size), axis=1, kind="stable")
            rows += np.arange(0, whole, size)[:, None]
            last = np.argsort(numbers[whole:], kind="stable") + whole
            part[:] = part[np.concatenate([rows.ravel(), last])]
        return order, generator.bit_generator.state, shards

    def draw(self, start: int, count: int) -> BatchIndices:
        index, jitter, ahead = [], [], self.ahead(start)
        while count > 0:
            epoch, first = divmod(start, len(self))
            order, state, _ = self._epoch(epoch)
            index.append(order[first : first + count].astype(np.int64))
            jitter.append(_rows(state, first, len(index[-1])))
            start, count = start + len(index[-1]), count - len(index[-1])
        numbers = np.concatenate(index)
        if self._members is not None:
            numbers = self._members[numbers].astype(np.int64)
        return BatchIndices(numbers, np.concatenate(jitter), ahead=ahead)

    def candidates(self, position: int) -> int:
        return len(self)

    def replacement(self, position: int, attempt: int) -> int:
        epoch, place = divmod(position, len(self))
        return int(self.draw(epoch * len(self) + (place + attempt * self._stride) % len(self), 1).index[0])

    def ahead(self, start: int) -> tuple[int, ...]:
        """Return the numbers of the shards that are read from a position on, if they are read in sequence.

        Shards without samples, all of which a filter has dropped or which are in other buckets, are left out.
        """
        if self.shuffle_buffer is None:
            return ()
        epoch, position = divmod(start, len(self))
        shards = self._epoch(epoch)[2]
        lengths = np.diff(self._starts)
        ends = np.cumsum(lengths[shards])
        block = position - position % self.shuffle_buffer
        first = int(np.searchsorted(ends, block, "right"))
        last = int(np.searchsorted(ends, block + self.shuffle_buffer, "left"))  # is read in this block
        near = shards[first : last + 1 + READ_AHEAD]
        return tuple((near[lengths[near] > 0] + self._first_shard).tolist())


def _rows(state: Any, first: int, count: int) -> np.ndarray:
    """Return rows ``first`` to ``first + count`` of the ``random((n, 3), float32)`` that a generator in this state would draw.

    Such a number takes half of a 64-bit number of PCG64, which can skip numbers; the generator may hold one half already.
    """
    if state["has_uint32"]:
        generator = _generator(state)
        held = generator.random(1, np.float32)
        skipped = 3 * first - 1
        if skipped < 0:
            return np.concatenate([held, generator.random(3 * count - 1, np.float32)]).reshape(-1, 3)
    else:
        generator, skipped = _generator(state), 3 * first
    generator.bit_generator.advance(skipped // 2)  # type: ignore[attr-defined]
    generator.random(skipped % 2, np.float32)
    return generator.random((count, 3), np.float32)


def _generator(state: Any) -> np.random.Generator:
    bits = np.random.PCG64()
    bits.state = state
    return np.random.Generator(bits)
