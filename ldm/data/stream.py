"""Batches in an order that depends only on (seed, epoch), so that a stream can start anywhere.

A training run reads one endless sequence of samples, epoch after epoch, each a permutation of the set. Step
``k`` of a run on ``w`` ranks with ``b`` samples a rank takes positions ``k w b`` to ``(k + 1) w b`` of it,
rank ``r`` the ``r``-th block of ``b``. A batch may span two epochs; nothing is dropped. The order does not depend on
the number of workers. A run that is resumed with another ``w`` or ``b`` continues at the same position of the sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.errors import DataError

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


class TrainStream:
    """Stream of the batches ``start_batch`` to ``total_batches`` of a run, all of full size.

    Iterating again continues where it stopped. ``len`` is always ``total_batches``, against which Lightning counts when it
    resumes; Lightning also saves and restores ``state_dict``.

    Args:
        samples: the training set.
        batch_size: samples per batch on this rank.
        seed: seed of order and augmentation.
        total_batches: batches of the complete run.
        start_batch: first batch to yield.
        shuffle_buffer: see :class:`Order`.
        rank: index of this process.
        world_size: number of processes that share the sequence.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        seed: int,
        total_batches: int,
        *,
        start_batch: int = 0,
        shuffle_buffer: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        assert 0 <= rank < world_size
        self.samples, self.batch_size, self.total_batches = samples, batch_size, total_batches
        self.rank, self.world_size = rank, world_size
        self.batch = start_batch
        self._origin = 0  # position of batch 0, if all batches had the present size
        self._order = Order(samples.lengths, seed, shuffle_buffer)

    def __len__(self) -> int:
        return self.total_batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in _batches(self.samples, self._draws()):
            self.batch += 1
            yield batch

    def _draws(self) -> Iterator[BatchIndices]:
        for batch in range(self.batch, self.total_batches):
            start = self._origin + (batch * self.world_size + self.rank) * self.batch_size
            yield self._order.draw(start, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches yielded so far, including those before ``start_batch``.

        After a change of the batch size also ``origin``, the position in the sequence at which batch 0 would have begun.
        """
        return {"batch": self.batch} | ({"origin": self._origin} if self._origin else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many batches."""
        self.batch, self._origin = state["batch"], state.get("origin", 0)


class EvaluationLoader:
    """Loader of every sample once and in order, without augmentation; the last batch may be smaller.

    With several ranks, rank ``r`` reads samples ``r``, ``r + world_size``, ...; none is repeated to equalise the ranks.
    """

    def __init__(self, samples: Samples, batch_size: int, *, rank: int = 0, world_size: int = 1):
        self.samples, self.batch_size = samples, batch_size
        self._index = np.arange(rank, len(samples), world_size)

    def __len__(self) -> int:
        return math.ceil(len(self._index) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self._index), self.batch_size)
        return _batches(self.samples, (BatchIndices(self._index[start : start + self.batch_size]) for start in starts))


def _batches(samples: Samples, draws: Iterator[BatchIndices]) -> Iterator[Batch]:
    """Yield one batch per entry of ``draws``, in order, prefetched by as many processes as the set requests."""
    if samples.workers == 0:
        yield from map(samples.__getitem__, draws)
        return
    loader = DataLoader(
        _Guarded(samples),
        sampler=_Once(draws),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=samples.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # by default the loader draws from the global generator
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


class _Guarded(Dataset[Batch | DataError]):
    """Dataset that returns errors as values, since one raised in a worker would arrive as the text of its traceback."""

    def __init__(self, samples: Samples):
        self._samples = samples

    def __getitem__(self, draw: BatchIndices) -> Batch | DataError:
        try:
            return self._samples[draw]
        except DataError as error:
            return error


class _Once(Sampler[BatchIndices]):
    """Sampler over an iterator of batch indices, computed lazily."""

    def __init__(self, draws: Iterator[BatchIndices]):
        self._draws = draws

    def __iter__(self) -> Iterator[BatchIndices]:
        return self._draws


def _as_is(batch: Any) -> Any:
    return batch
