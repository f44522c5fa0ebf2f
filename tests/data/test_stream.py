from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.config import ShardsData
from ldm.data.order import Order
from ldm.data.samples import Batch, BatchIndices, Samples, take
from ldm.data.shards import write_shard
from ldm.data.stream import EvaluationLoader, TrainStream, dead_worker
from tests.data.pictures import sample, write_shards

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
buffers = st.one_of(st.none(), st.integers(1, 12))


class Numbers(Samples):
    """A set whose batches say which samples they hold."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.fingerprint = lengths, str(lengths)

    def annotations(self, draw: BatchIndices) -> Batch:
        return take({"key": [str(i) for i in range(len(self))]}, draw.index)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        return {"image": torch.from_numpy(draw.index), **self.annotations(draw)}


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (f"import os; os.kill(os.getpid(), {signal.SIGKILL})", "was killed by the signal 'Killed'"),
        ("import os; os._exit(3)", "ended unexpectedly"),
    ],
    ids=["killed", "ended"],
)
def test_a_worker_that_has_ended_is_named(code: str, how: str) -> None:
    """Also if the connection to it is what fails first."""
    context = multiprocessing.get_context("fork")
    alive, dead = context.Process(target=time.sleep, args=[60]), context.Process(target=exec, args=[code])
    for process in (alive, dead):
        process.start()
    found = dead_worker([alive, dead])
    alive.kill()
    assert str(found).startswith(f"the process {dead.pid} of data.workers {how}; run the same command to resume")
    assert dead_worker([]) is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardsData:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [4, 3, 4], labelled=True)
    return ShardsData(str(folder), val=str(folder), size=(8, 6), flip=True, workers=0)


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]) if name in ("image", "label") else one[name] == other[name]


@given(lengths, st.integers(0, 9), st.integers(0, 5), buffers)
def test_an_epoch_is_a_permutation(lengths: list[int], seed: int, epoch: int, buffer: int | None) -> None:
    order = Order(lengths, seed, buffer).permutation(epoch)
    assert sorted(order) == list(range(sum(lengths)))


@given(lengths, st.integers(0, 9), st.integers(0, 2), buffers, st.integers(0, 100), st.integers(1, 9))
def test_the_order_is_that_of_earlier_versions(
    lengths: list[int], seed: int, epoch: int, buffer: int | None, start: int, count: int
) -> None:
    n = sum(lengths)
    generator = np.random.default_rng([seed, epoch])
    if buffer is None:
        order = generator.permutation(n)
    else:
        starts = np.cumsum((0, *lengths))
        shards = generator.permutation(len(lengths))
        read = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
        order = read[np.lexsort((generator.random(n), np.arange(n) // buffer))]
    jitter = generator.random((n, 3), np.float32)
    start = start % n
    count = min(count, n - start)
    draw = Order(lengths, seed, buffer).draw(epoch * n + start, count)
    assert draw.jitter is not None
    assert draw.index.dtype == np.int64
    assert np.array_equal(draw.index, order[start : start + count])
    assert np.array_equal(draw.jitter, jitter[start : start + count])


@given(lengths, st.integers(0, 9), st.integers(1, 12), st.integers(0, 100))
def test_the_shards_of_a_batch_are_announced(lengths: list[int], seed: int, buffer: int, start: int) -> None:
    draw = Order(lengths, seed, buffer).draw(start, 1)
    shard = np.repeat(np.arange(len(lengths)), lengths)[draw.index[0]]
    assert shard in draw.ahead
    assert len(set(draw.ahead)) == len(draw.ahead)


def test_shards_without_samples_are_not_announced() -> None:
    """Such as those of which filters drop all samples: they would be copied for nothing."""
    lengths = [0, 3, 0, 0, 2, 0, 4, 0, 0, 1]
    order = Order(lengths, 7, 2)
    ahead = [order.draw(start, 2).ahead for start in range(0, len(order), 2)]
    assert {shard for shards in ahead for shard in shards} == {1, 4, 6, 9}


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(Order([50], seed).permutation(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(lengths, st.integers(0, 9), st.integers(1, 12))
def test_a_buffer_keeps_reading_near_sequential(lengths: list[int], seed: int, buffer: int) -> None:
    """Within each block of the order lie samples of neighbours in the reading order of the shards."""
    order = Order(lengths, seed, buffer).permutation(0)
    shard = np.repeat(np.arange(len(lengths)), lengths)
    begun: list[int] = []
    for start in range(0, len(order), buffer):
        block = order[start : start + buffer]
        new = set(shard[block]) - set(begun)
        open_before = {s for s in begun if set(np.flatnonzero(shard == s)) - set(order[:start])}
        assert len(open_before) <= 1
        begun += new


@given(lengths, st.integers(1, 7), st.integers(0, 20), st.integers(1, 3), buffers)
def test_a_stream_goes_on_anywhere_as_if_never_stopped(
    lengths: list[int], batch_size: int, start: int, world_size: int, buffer: int | None
) -> None:
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "shuffle_buffer": buffer}
        whole = list(TrainStream(Numbers(lengths), batch_size, 7, 20, **place))
        rest = list(TrainStream(Numbers(lengths), batch_size, 7, 20, start_batch=start, **place))
        assert len(whole) == 20
        assert_equal(rest, whole[start:])


@given(lengths, st.integers(1, 7), st.integers(1, 4))
def test_the_ranks_together_see_each_sample_once_an_epoch(lengths: list[int], batch_size: int, ranks: int) -> None:
    n = sum(lengths)
    streams = [TrainStream(Numbers(lengths), batch_size, 0, n, rank=r, world_size=ranks) for r in range(ranks)]
    seen = [i for batches in zip(*streams, strict=True) for batch in batches for i in batch["image"].tolist()]
    assert len(seen) == n * batch_size * ranks
    for epoch in range(batch_size * ranks):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(lengths, st.integers(1, 7), st.integers(0, 10), st.integers(0, 10))
def test_the_state_of_a_stream_restores_its_place(lengths: list[int], batch_size: int, first: int, seed: int) -> None:
    stream = TrainStream(Numbers(lengths), batch_size, seed, 10)
    before = [batch for batch, _ in zip(stream, range(first), strict=False)]
    other = TrainStream(Numbers(lengths), batch_size, seed, 10)
    other.load_state_dict({"batch": len(before)})
    assert_equal(before + list(other), list(TrainStream(Numbers(lengths), batch_size, seed, 10)))
    assert other.state_dict() == {"batch": 10}
    assert len(other) == 10


@pytest.mark.parametrize("crop", ["center", "random"])
def test_workers_change_nothing(data: ShardsData, crop: str) -> None:
    data = dataclasses.replace(data, crop=crop)
    streams = [
        TrainStream(dataclasses.replace(data, workers=workers).open("train"), 4, 3, 9, start_batch=2)
        for workers in (0, 2)
    ]
    assert_equal(list(streams[0]), list(streams[1]))


def test_memory_and_disk_give_the_same_batches(data: ShardsData) -> None:
    disk, memory = (dataclasses.replace(data, cache=cache).open("train") for cache in ("none", "ram"))
    assert_equal(list(TrainStream(disk, 5, 0, 6)), list(TrainStream(memory, 5, 0, 6)))
    assert_equal(list(EvaluationLoader(disk, 4)), list(EvaluationLoader(memory, 4)))
    assert disk.fingerprint == memory.fingerprint


def test_a_stream_draws_nothing_from_the_global_generators(data: ShardsData) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 (the state that must not move)
    list(TrainStream(dataclasses.replace(data, workers=1).open("train"), 4, 3, 3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_a_batch_is_pictures_captions_keys_and_labels(data: ShardsData) -> None:
    batch = next(iter(TrainStream(data.open("train"), 5, 0, 1)))
    assert batch["image"].shape == (5, 3, 8, 6)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["text"] == [f"caption {int(key)}" for key in batch["key"]]
    assert batch["label"].tolist() == [int(key) % 3 for key in batch["key"]]


def test_half_of_the_draws_are_mirrored(data: ShardsData) -> None:
    plain = {
        key: image
        for batch in EvaluationLoader(data.open("train"), 4)
        for key, image in zip(batch["key"], batch["image"], strict=True)
    }
    mirrored = 0
    for batch in TrainStream(data.open("train"), 10, 0, 20):
        for key, image in zip(batch["key"], batch["image"], strict=True):
            assert torch.equal(image, plain[key]) or torch.equal(image.flip(2), plain[key])
            mirrored += not torch.equal(image, plain[key])
    assert 70 < mirrored < 130  # of 200: four standard deviations


@given(lengths, st.integers(1, 7), st.integers(1, 4))
def test_evaluation_sees_every_sample_once(lengths: list[int], batch_size: int, world_size: int) -> None:
    """In the batches of one rank with the batch size of all; every rank has as many batches, none of which is empty."""
    loaders = [
        EvaluationLoader(Numbers(lengths), batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    batches = [[batch["image"].tolist() for batch in loader] for loader in loaders]
    assert {len(part) for part in batches} == {len(loader) for loader in loaders}
    assert all(0 < len(batch) <= batch_size for part in batches for batch in part)
    seen = [
        [i for part, loader in zip(batches, loaders, strict=True) if loader.rows(k) for i in part[k]]
        for k in range(len(loaders[0]))
    ]
    whole = EvaluationLoader(Numbers(lengths), batch_size * world_size)
    assert seen == [batch["image"].tolist() for batch in whole]
    assert [loaders[0].size(k) for k in range(len(seen))] == [len(batch) for batch in seen]


def test_a_rank_without_a_good_sample_has_as_many_batches(tmp_path: Path) -> None:
    """The place of the bad sample, alone in its batch, is taken by a good one that does not count."""
    broken = dataclasses.replace(sample(3), image=b"no image")
    write_shard(tmp_path / "a.tar", [*(sample(i) for i in range(3)), broken, sample(4), sample(5)])
    samples = ShardsData(str(tmp_path), size=8).open("train")
    loaders = [EvaluationLoader(samples, 1, rank=rank, world_size=2) for rank in range(2)]
    batches = [list(loader) for loader in loaders]
    assert [len(part) for part in batches] == [3, 3]
    keys = [
        [each["key"] for k, each in enumerate(part) if loader.rows(k)]
        for part, loader in zip(batches, loaders, strict=True)
    ]
    assert keys == [[["0000"], ["0002"], ["0004"]], [["0001"], ["0005"]]]
    assert [len(batch.get("bad", ())) for batch in batches[1]] == [0, 1, 0]
