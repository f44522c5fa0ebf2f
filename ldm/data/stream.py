"""Batches in an order that depends only on (seed, epoch), so that a stream can start anywhere.

A training run reads one endless sequence of samples, epoch after epoch, each a permutation of the set. Step
``k`` of a run on ``w`` ranks with ``b`` samples a rank takes positions ``k w b`` to ``(k + 1) w b`` of it,
rank ``r`` the ``r``-th block of ``b``. A batch may span two epochs; nothing is dropped. The order does not depend on
the number of workers. A run that is resumed with another ``w`` or ``b`` continues at the same position of the sequence.

A bad sample is replaced in its position; the other positions keep their samples. Of an epoch of ``n`` samples, position ``i`` is
given to the first good one of those at ``i``, ``i + s``, ``i + 2 s``, ... (modulo ``n``), where the stride ``s`` depends on ``n``
and the shuffle buffer alone. What replaces a sample is thus a function of its position, whatever the batches, ranks and workers,
and wherever the run was resumed. A replacement is used at its own position too, so it is not the next one, which would put the
same sample twice into a batch: it comes from ``shuffle_buffer`` positions ahead, where shards are read next, or without a buffer
from another part of the epoch. It gets the crop, flip and caption choice of the position that it fills.
"""

from __future__ import annotations

import functools
import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.bad_samples import BAD, BadSample
from ldm.data.samples import Batch, BatchIndices, Samples, take
from ldm.errors import DataError
from ldm.processes import STOP_SIGNALS

MAX_REPLACED = 100
"""Number of bad samples in succession after which a position is given up, since hardly any sample can be good."""

_STRIDE = 0.618  # of an epoch: multiples of the golden section are far from each other

READ_AHEAD = 3
"""Number of shards that are copied to the cache before they are read."""

_SHUFFLED_AT_ONCE = 1 << 20  # samples

_ENDING = 1.0  # seconds in which a worker that is ending has ended


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

    A batch in which bad samples were replaced lists them as ``bad`` (:class:`~ldm.data.bad_samples.BadSample`). Iterating again
    continues where it stopped. ``len`` is always ``total_batches``, against which Lightning counts when it
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
        batches = _batches(_Replaced(self.samples, self._order), self._draws(), self.samples.workers)
        for batch in self._timed(batches):
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
            yield replace(self._order.draw(start, self.batch_size), start=start)

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

    Each batch of all ranks consists of the next ``world_size * batch_size`` samples, of which rank ``r`` reads the ``r``-th part.
    All ranks have the same number of batches. Where the last one has fewer samples than there are ranks, a rank without a
    sample reads one that is not its own, and :meth:`rows` is empty.

    Bad samples are left out and listed as ``bad`` in the batch that would have them, or in another one if it would be empty; with
    several ranks, a batch that would be empty has the first good sample, and no rows.

    Raises:
        DataError: when iterating, if all samples are bad.
    """

    def __init__(self, samples: Samples, batch_size: int, *, rank: int = 0, world_size: int = 1):
        self.samples, self.batch_size = samples, batch_size
        self.rank, self.world_size = rank, world_size
        self._without: set[int] = set()  # batches of which no sample of this rank is good

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / (self.world_size * self.batch_size))

    def size(self, batch: int) -> int:
        """Return the number of samples of a batch on all ranks."""
        most = self.world_size * self.batch_size
        return min(most, len(self.samples) - batch * most)

    def rows(self, batch: int) -> range:
        """Return which of the samples of a batch belong to this rank."""
        size = 0 if batch in self._without else self.size(batch)
        return range(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        held: Batch = {}
        bad: list[BadSample] = []
        for number, batch in enumerate(
            _batches(self.samples, map(self._indices, range(len(self))), self.samples.workers)
        ):
            found = batch.pop(BAD, {}).values()
            bad += found if self.rows(number) else ()  # else another rank reports it
            if not batch and self.world_size == 1:
                continue
            if not batch:
                self._without.add(number)
                batch = first_batch(self.samples, 1)
            if held:
                yield held
            held, bad = {**batch, **({BAD: bad} if bad else {})}, []
        if held:
            yield {**held, **({BAD: held.get(BAD, []) + bad} if bad else {})}
        elif bad:
            raise none_good(bad)

    def _indices(self, batch: int) -> BatchIndices:
        rows = self.rows(batch) or range(1)
        return BatchIndices(batch * self.world_size * self.batch_size + np.arange(rows.start, rows.stop))


def batches_in_order(samples: Samples, index: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Yield the samples ``index`` in batches without augmentation, and without bad samples, as :class:`Samples` returns them."""
    starts = range(0, len(index), batch_size)
    draws = (BatchIndices(index[start : start + batch_size]) for start in starts)
    return _batches(samples, draws, samples.workers)


def first_batch(samples: Samples, count: int) -> Batch:
    """Return a batch of the first good samples, repeated if there are fewer, without starting workers.

    Raises:
        DataError: there are none among the first.
    """
    bad: list[BadSample] = []
    for start in range(0, min(len(samples), MAX_REPLACED * count), count):
        batch = samples[BatchIndices(np.arange(start, min(start + count, len(samples))))]
        bad += batch.pop(BAD, {}).values()
        if batch:
            return take(batch, np.arange(count) % len(batch["key"]))
    raise none_good(bad)


def worker_death(error: BaseException) -> DataError | None:
    """Return the error for a process that loads data and has ended, if ``error`` is that of torch's DataLoader."""
    text = str(error)
    if not (isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid")):
        return None
    process = "".join(itertools.takewhile(lambda each: each not in "),", text.partition("pid")[2].lstrip("(s) ")))
    return _ended(process, text.partition("killed by signal: ")[2].split(".")[0].strip())


def _ended(process: str | int | None, signal_name: str | None) -> DataError:
    """Return the error for a process that loads data and has ended, by a signal if one is given."""
    how = f"was killed by the signal {signal_name!r}" if signal_name else "ended unexpectedly"
    return DataError(
        f"the process {process} of data.workers {how}; run the same command to resume from the last checkpoint, with fewer "
        "data.workers if memory ran out."
    )


def dead_worker(workers: Sequence[BaseProcess]) -> DataError | None:
    """Return the error for the first worker that has ended or is just ending; None if all are alive."""
    for worker in workers:
        worker.join(_ENDING)
        if worker.exitcode is not None:
            return _ended(worker.pid, signal.strsignal(-worker.exitcode) if worker.exitcode < 0 else None)
    return None


def none_good(bad: Sequence[BadSample]) -> DataError:
    """Return the error for samples all of which are bad."""
    return DataError(
        f"{len(bad)} samples in succession cannot be used, the first of them {bad[0].where}: {bad[0].detail}; "
        "check the sources given under data."
    )


def _batches(samples: Dataset[Batch], draws: Iterator[BatchIndices], workers: int) -> Iterator[Batch]:
    """Yield one batch per entry of ``draws``, in order, prefetched by a number of processes."""
    if workers == 0:
        yield from map(samples.__getitem__, draws)
        return
    loader = DataLoader(
        _Guarded(samples),
        sampler=_Once(draws),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # by default the loader draws from the global generator
        worker_init_fn=_outlive_signals,
    )
    batches: Any = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A worker that ends while a batch is received from it is noticed by the connection first.
        death = worker_death(error) or dead_worker(batches._workers)
        if death is None:
            raise
        raise death from None


class _Replaced(Dataset[Batch]):
    """Samples by positions of an order, with bad ones replaced as the module says; the batch lists them as ``bad``."""

    def __init__(self, samples: Samples, order: Order):
        self._samples, self._order = samples, order
        self._size = len(samples)
        buffer = order.shuffle_buffer or self._size
        far = buffer if buffer < self._size else max(1, round(_STRIDE * self._size))
        self._stride = next(stride for stride in itertools.count(far) if math.gcd(stride, self._size) == 1)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        batch = self._samples[draw]
        if BAD not in batch:
            return batch
        assert draw.start is not None
        bad: list[BadSample] = []
        parts: list[Batch] = []
        rows: list[int] = []  # row in the batch of each sample of the parts
        missing, attempt = list(range(len(draw))), 0
        while True:
            failed = batch.pop(BAD, {})
            bad += [replace(each, position=draw.start + missing[row]) for row, each in failed.items()]
            parts += [batch] if batch else []
            rows += [row for i, row in enumerate(missing) if i not in failed]
            missing = [missing[i] for i in failed]
            if not missing:
                return {**take(_joined(parts), np.argsort(rows)), BAD: bad}
            attempt += 1
            if attempt == min(MAX_REPLACED, self._size):
                raise none_good([each for each in bad if each.position == draw.start + missing[0]])
            index = [self._replacement(draw.start + row, attempt) for row in missing]
            batch = self._samples[BatchIndices(np.array(index), None if draw.jitter is None else draw.jitter[missing])]

    def _replacement(self, position: int, attempt: int) -> int:
        """Return the sample that is tried for a position after ``attempt`` bad ones."""
        epoch, place = divmod(position, self._size)
        return int(self._order.draw(epoch * self._size + (place + attempt * self._stride) % self._size, 1).index[0])


def _joined(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches with the same keys."""
    return {
        name: torch.cat([batch[name] for batch in batches])
        if isinstance(value, Tensor)
        else [entry for batch in batches for entry in batch[name]]
        for name, value in batches[0].items()
    }


class _Guarded(Dataset[Batch | DataError]):
    """Dataset that returns errors as values, since one raised in a worker would arrive as the text of its traceback."""

    def __init__(self, samples: Dataset[Batch]):
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
