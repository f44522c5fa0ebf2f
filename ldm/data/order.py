"""Order of the samples of a set in training: a function of the seed and the position."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.data.samples import BatchIndices

READ_AHEAD = 3
"""Number of shards that are copied to the cache before they are read."""

_SHUFFLED_AT_ONCE = 1 << 20  # samples


class Order:
    """Endless, shuffled sequence of the samples of a set.

    Args:
        lengths: number of samples of each shard.
        seed: seed of the shuffling and the jitter.
        shuffle_buffer: None shuffles the complete set. A number keeps reading nearly sequential: shards come in
            random order, and samples are shuffled within blocks of that size.
    """

    def __init__(self, lengths: Sequence[int], seed: int, shuffle_buffer: int | None = None):
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self._starts = np.cumsum((0, *lengths))
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)  # two, since a batch may span two epochs

    def __len__(self) -> int:
        """Number of samples of an epoch."""
        return int(self._starts[-1])

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch in order, uint32 ``[n]``."""
        return self._epoch(epoch)[0]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, Any, np.ndarray]:
        """Return the permutation of an epoch, the state of the generator after it, and the order of the shards."""
        generator = np.random.default_rng([self.seed, epoch])
        n, size = len(self), self.shuffle_buffer
        if size is None:
            order = np.arange(n, dtype=np.uint32)
            generator.shuffle(order)  # as generator.permutation(n), in half of the memory
            return order, generator.bit_generator.state, np.arange(0)
        shards = generator.permutation(len(self._starts) - 1)
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
        """Return the samples at positions ``start`` to ``start + count`` of the sequence."""
        index, jitter, ahead = [], [], self._ahead(*divmod(start, len(self)))
        while count > 0:
            epoch, first = divmod(start, len(self))
            order, state, _ = self._epoch(epoch)
            index.append(order[first : first + count].astype(np.int64))
            jitter.append(_rows(state, first, len(index[-1])))
            start, count = start + len(index[-1]), count - len(index[-1])
        return BatchIndices(np.concatenate(index), np.concatenate(jitter), ahead=ahead)

    def _ahead(self, epoch: int, position: int) -> tuple[int, ...]:
        """Return the numbers of the shards that are read from a position of an epoch on, if they are read in sequence."""
        shards = self._epoch(epoch)[2]
        if self.shuffle_buffer is None:
            return ()
        ends = np.cumsum((self._starts[1:] - self._starts[:-1])[shards])
        block = position - position % self.shuffle_buffer
        first = int(np.searchsorted(ends, block, "right"))
        last = int(np.searchsorted(ends, block + self.shuffle_buffer, "left"))  # is read in this block
        return tuple(shards[first : last + 1 + READ_AHEAD].tolist())


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
