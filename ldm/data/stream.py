"""Batches in an order that depends only on (seed, epoch), so that a stream can start anywhere.

A training run reads one endless sequence of samples, epoch after epoch, each a permutation of the set. Step ``k`` of a run on
``w`` ranks with ``b`` samples a rank takes positions ``k w b`` to ``(k + 1) w b`` of it, rank ``r`` the ``r``-th block of
``b``. A batch may span two epochs; nothing is dropped. The order does not depend on the number of workers. A run that is
resumed with another ``w`` or ``b`` continues at the same position of the sequence.

A set of several sources with weights has such a sequence for each source, and a position takes the next sample of its source
(:mod:`ldm.data.mixture`). A set with aspect buckets has one for each bucket, and each batch takes the next samples of a bucket
(:mod:`ldm.data.bucket_order`).

A bad sample is replaced in its position; the other positions keep their samples. Of an epoch of ``n`` samples, position ``i``
is given to the first good one of those at ``i``, ``i + s``, ``i + 2 s``, ... (modulo ``n``), where the stride ``s`` depends on
``n`` and the shuffle buffer alone; with several sources or buckets, this holds for the sequence of each. What replaces a sample
is thus a function of its position, whatever the batches, ranks and workers, and wherever the run was resumed. A replacement is
used at its own position too, so it is not the next one, which would put the same sample twice into a batch: it comes from
``shuffle_buffer`` positions ahead, where shards are read next, or without a buffer from another part of the epoch. It gets the
crop, flip and caption choice of the position that it fills.
"""

from __future__ import annotations

import functools
import itertools
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
from ldm.data.bucket_order import order_of
from ldm.data.buckets import Shape
from ldm.data.order import SampleOrder
from ldm.data.samples import Batch, BatchIndices, Samples, take
from ldm.errors import DataError
from ldm.processes import STOP_SIGNALS

MAX_REPLACED = 100
"""Number of bad samples in succession after which a position is given up, since hardly any sample can be good."""

_ENDING = 1.0  # seconds in which a worker that is ending has ended


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
        self._history = [(0, batch_size * world_size)]
        self._make_order = functools.partial(order_of, samples, seed, shuffle_buffer)
        self._order = self._make_order(self._history)

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

        After a change of the batch size also ``origin``, the position in the sequence at which batch 0 would have begun. With
        buckets also ``history``, the sizes of batches on all ranks; see :mod:`ldm.data.bucket_order`.
        """
        state: dict[str, Any] = {"batch": self.batch} | ({"origin": self._origin} if self._origin else {})
        return state if self.samples.buckets() is None else {**state, "history": list(map(list, self._history))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many batches."""
        self.batch, self._origin = state["batch"], state.get("origin", 0)
        if "history" in state:
            size = self.batch_size * self.world_size
            self._history = [(position, batch) for position, batch in state["history"]]
            if self._history[-1][1] != size:
                self._history.append((self._origin + self.batch * size, size))
            self._order = self._make_order(self._history)


class EvaluationLoader:
    """Loader of every sample once and in order, without augmentation; the last batch may be smaller.

    Each batch of all ranks consists of the next ``world_size * batch_size`` samples, of which rank ``r`` reads the ``r``-th part;
    with ``bucketed``, of the next samples of one bucket, one bucket after another.
    All ranks have the same number of batches. Where the last one has fewer samples than there are ranks, a rank without a
    sample reads one that is not its own, and :meth:`rows` is empty.

    Bad samples are left out and listed as ``bad`` in the batch that would have them, or in another one if it would be empty; with
    several ranks, a batch that would be empty has the first good sample, and no rows.

    Raises:
        DataError: when iterating, if all samples are bad.

    Args:
        samples: the set.
        batch_size: samples per batch on this rank.
        rank: index of this process.
        world_size: number of processes that share the batches.
        bucketed: whether images have the shapes of their buckets, if the set has them; otherwise all have its size.
        numbers: int64 ``[n]``, the samples to load; None for all.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        bucketed: bool = False,
        numbers: np.ndarray | None = None,
    ):
        self.samples, self.batch_size = samples, batch_size
        self.rank, self.world_size = rank, world_size
        self._without: set[int] = set()  # batches of which no sample of this rank is good
        everything = np.arange(len(samples)) if numbers is None else numbers
        groups = samples.by_shape() if bucketed else {None: everything}
        most = world_size * batch_size
        self._draws = [  # of all ranks
            BatchIndices(numbers[start : start + most], shape=shape)
            for shape, numbers in groups.items()
            for start in range(0, len(numbers), most)
        ]

    def __len__(self) -> int:
        return len(self._draws)

    def size(self, batch: int) -> int:
        """Return the number of samples of a batch on all ranks."""
        return len(self._draws[batch])

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
        draw, rows = self._draws[batch], self.rows(batch) or range(1)
        return replace(draw, index=draw.index[rows.start : rows.stop])


def batches_in_order(
    samples: Samples, index: np.ndarray, batch_size: int, shape: Shape | None = None
) -> Iterator[Batch]:
    """Yield the samples ``index`` in batches without augmentation, and without bad samples, as :class:`Samples` returns them.

    Args:
        samples: the set.
        index: int64 ``[n]``, sample numbers.
        batch_size: samples per batch.
        shape: height and width of the images, that of their bucket; None: the size of the set.
    """
    starts = range(0, len(index), batch_size)
    draws = (BatchIndices(index[start : start + batch_size], shape=shape) for start in starts)
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

    def __init__(self, samples: Samples, order: SampleOrder):
        self._samples, self._order = samples, order

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
            positions = [draw.start + row for row in missing]
            for position in positions:
                if attempt == min(MAX_REPLACED, self._order.candidates(position)):
                    raise none_good([each for each in bad if each.position == position])
            index = [self._order.replacement(position, attempt) for position in positions]
            jitter = None if draw.jitter is None else draw.jitter[missing]
            batch = self._samples[replace(draw, index=np.array(index), jitter=jitter)]


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
