"""Batches in an order that depends only on (seed, epoch), so that a stream can start anywhere.

A training run reads one endless sequence of samples, epoch after epoch, each a permutation of the set. Step
``k`` of a run on ``w`` ranks with ``b`` samples a rank takes positions ``k w b`` to ``(k + 1) w b`` of it,
rank ``r`` the ``r``-th block of ``b``. A batch may span two epochs; nothing is dropped. The order does not depend on
the number of workers. A run that is resumed with another ``w`` or ``b`` continues at the same position of the sequence.
"""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.errors import DataError
from ldm.processes import STOP_SIGNALS


class Order:
    """Endless, shuffled sequence of the samples of a set.

    Args:
        lengths: number of samples of each shard.
        seed: seed of the shuffling and the jitter.
        shuffle_buffer: None shuffles the complete set. A number keeps reading nearly sequential: shards come in
            random order, and samples are shuffled within blocks of that size.
    """

    def __init__(self, lengths: Sequence[int], seed: int, shuffle_buffer: int | None = None):
        self.lengths, self.seed, self.shuffle_buffer = tuple(lengths), seed, shuffle_buffer
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)  # two, since a batch may span two epochs

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permutation ``[n]`` and jitter ``[n 3]`` of an epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        n = sum(self.lengths)
        if self.shuffle_buffer is None:
            order = generator.permutation(n)
        else:
            starts = np.cumsum((0, *self.lengths))
            shards = generator.permutation(len(self.lengths))
            read = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
            order = read[np.lexsort((generator.random(n), np.arange(n) // self.shuffle_buffer))]
        return order, generator.random((n, 3), np.float32)

    def draw(self, start: int, count: int) -> BatchIndices:
        """Return the samples at positions ``start`` to ``start + count`` of the sequence."""
        n = sum(self.lengths)
        index, jitter = [], []
        while count > 0:
            epoch, first = divmod(start, n)
            order, numbers = self.epoch(epoch)
            index.append(order[first : first + count])
            jitter.append(numbers[first : first + count])
            start, count = start + len(index[-1]), count - len(index[-1])
        return BatchIndices(np.concatenate(index), np.concatenate(jitter))


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
        self.waited = 0.0  # seconds spent to get batches
        self._origin = 0  # position of batch 0, if all batches had the present size
        self._order = Order(samples.lengths, seed, shuffle_buffer)

    def __len__(self) -> int:
        return self.total_batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._timed(_batches(self.samples, self._draws())):
            self.batch += 1
            yield batch

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, adding the time for which each is waited to ``waited``."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
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
        worker_init_fn=_outlive_signals,
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


def _outlive_signals(worker: int) -> None:
    """Let a worker go on when its process group receives a signal, until the training has saved and ends it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The training ends a worker that hangs by a SIGTERM too: the second one has its usual effect.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class _Once(Sampler[BatchIndices]):
    """Sampler over an iterator of batch indices, computed lazily."""

    def __init__(self, draws: Iterator[BatchIndices]):
        self._draws = draws

    def __iter__(self) -> Iterator[BatchIndices]:
        return self._draws


def _as_is(batch: Any) -> Any:
    return batch
