"""Samples that cannot be decoded: replaced in training by their position alone, left out in evaluation, and listed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.bad_samples import BAD, MAX_NAMED, BadSample, BadSamplesFile, Reason, dropped, read_counts
from ldm.data.config import ShardsData
from ldm.data.latents import cache_latents
from ldm.data.order import Order
from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.data.shards import write_shard
from ldm.data.stream import MAX_REPLACED, EvaluationLoader, TrainStream, first_batch
from ldm.data.transforms import decode
from ldm.errors import DataError
from tests.data.pictures import encoded, sample
from tests.data.test_latents import TinyFirstStage
from tests.data.test_stream import assert_equal, buffers, lengths


class WithBad(Samples):
    """A set of numbers, some of which are bad."""

    def __init__(self, lengths: list[int], bad: set[int]):
        self.lengths, self.fingerprint, self.bad = lengths, str(lengths), bad

    def __getitem__(self, draw: BatchIndices) -> Batch:
        bad = {
            row: BadSample(Reason.BROKEN_IMAGE, str(i), "a.tar", "is broken", i)
            for row, i in enumerate(draw.index.tolist())
            if i in self.bad
        }
        good = draw.without(bad)
        batch: Batch = {BAD: bad} if bad else {}
        if len(good):
            assert good.jitter is not None or draw.jitter is None
            batch |= {"image": torch.from_numpy(good.index), "key": [str(i) for i in good.index]}
            batch |= {"text": [str(row) for row in good.jitter]} if good.jitter is not None else {}
        return batch


sets = lengths.flatmap(
    lambda each: st.tuples(st.just(each), st.sets(st.integers(0, sum(each) - 1), max_size=sum(each) - 1))
)


def sequence(samples: Samples, count: int, batch_size: int, start: int, ranks: int, buffer: int | None) -> list[object]:
    """What a training is given for the positions from ``start`` on: key, jitter, and the bad samples found there."""
    streams = []
    for rank in range(ranks):
        stream = TrainStream(samples, batch_size, 3, count, shuffle_buffer=buffer, rank=rank, world_size=ranks)
        stream.load_state_dict({"batch": 0, "origin": start})
        streams.append(stream)
    rows = []
    for batches in zip(*streams, strict=True):
        for batch in batches:
            bad = batch.get(BAD, [])
            for key, jitter in zip(batch["key"], batch["text"], strict=True):
                position = start + len(rows)
                rows.append((key, jitter, [each.key for each in bad if each.position == position]))
    return rows


@given(sets, buffers, st.integers(1, 5), st.integers(1, 3), st.integers(0, 30))
def test_a_replacement_depends_on_its_position_alone(
    content: tuple[list[int], set[int]], buffer: int | None, batch_size: int, ranks: int, start: int
) -> None:
    samples = WithBad(*content)
    reference = sequence(samples, 60, 1, 0, 1, buffer)
    resumed = sequence(samples, 3, batch_size, start, ranks, buffer)
    assert resumed == reference[start : start + len(resumed)]


@given(sets, buffers)
def test_good_samples_keep_their_positions_and_bad_ones_are_listed_once_per_use(
    content: tuple[list[int], set[int]], buffer: int | None
) -> None:
    samples = WithBad(*content)
    draw = Order(samples.lengths, 3, buffer).draw(0, 40)
    used = sequence(samples, 40, 1, 0, 1, buffer)
    for (key, jitter, bad), i, numbers in zip(used, draw.index.tolist(), draw.jitter, strict=True):
        assert jitter == str(numbers)  # the crop is that of the position
        assert int(key) not in samples.bad
        assert (key, bad) == (str(i), []) if i not in samples.bad else bad[0] == str(i)
        assert len(set(bad)) == len(bad)
        assert {*map(int, bad)} <= samples.bad


@given(st.integers(64, 500), st.integers(1, 5), st.integers(0, 9))
def test_a_replacement_is_not_in_the_batch_already(n: int, bad: int, seed: int) -> None:
    """A contrastive loss would count it as its own negative."""
    samples = WithBad([n], set(np.random.default_rng(seed).permutation(n)[:bad].tolist()))
    for batch in TrainStream(samples, 8, seed, n // 8):
        assert len(set(batch["key"])) == 8


def test_a_set_without_good_samples_is_an_error() -> None:
    for n in (3, 1000):
        samples = WithBad([n], set(range(n)))
        message = rf"^{min(n, MAX_REPLACED)} samples in succession cannot be used, the first of them '\d+' in a\.tar"
        with pytest.raises(DataError, match=message):
            next(iter(TrainStream(samples, 2, 0, 1)))
        with pytest.raises(DataError, match="samples in succession cannot be used"):
            list(EvaluationLoader(samples, 2))
    with pytest.raises(DataError, match="samples in succession cannot be used"):
        first_batch(samples, 2)


@given(sets, st.integers(1, 7), st.integers(1, 3))
def test_evaluation_leaves_bad_samples_out_and_lists_them(
    content: tuple[list[int], set[int]], batch_size: int, ranks: int
) -> None:
    samples, seen, bad = WithBad(*content), [], []
    assume(len(samples.bad) < len(samples))
    for rank in range(ranks):
        loader = EvaluationLoader(samples, batch_size, rank=rank, world_size=ranks)
        for number, batch in enumerate(loader):
            assert len(batch["key"]) > 0
            if ranks == 1 or loader.rows(number):
                seen += map(int, batch["key"])
            bad += [each.index for each in batch.get(BAD, ())]
    assert sorted([*seen, *bad]) == list(range(len(samples)))
    assert {*bad} == samples.bad


@given(sets, st.integers(1, 20))
def test_a_first_batch_is_full(content: tuple[list[int], set[int]], count: int) -> None:
    samples = WithBad(*content)
    batch = first_batch(samples, count)
    assert len(batch["key"]) == len(batch["image"]) == count
    assert not samples.bad & set(map(int, batch["key"]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardsData:
    """Eleven samples with labels and maps; 2 has a broken image, 5 a broken map, 7 a broken label, 9 a broken caption."""
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for i in range(11):
        each, labels = sample(i, labelled=True), encoded(Image.new("L", (12, 10 + i % 5)))
        annotations = {**each.annotations, "semantic": b"no map" if i == 5 else labels}
        each = dataclasses.replace(each, annotations=annotations, image=each.image[:-40] if i == 2 else each.image)
        samples.append(each)
    samples[7] = dataclasses.replace(samples[7], annotations={**samples[7].annotations, "label": b"seven"})
    write_shard(folder / "a.tar", [each for each in samples if each.key != "0009"])
    broken = dataclasses.replace(samples[9], annotations={**samples[9].annotations, "text": b"\xff"})
    write_shard(folder / "b.tar", [broken])
    return ShardsData(str(folder), val=str(folder), size=(8, 8), flip=True, workers=0)


def listed(batches: list[Batch]) -> list[tuple[object, ...]]:
    return [(each.position, each.key, each.reason) for batch in batches for each in batch.get(BAD, ())]


def test_workers_caches_and_latents_replace_the_same_samples(data: ShardsData, tmp_path: Path) -> None:
    plain = dataclasses.replace(data, flip=False)
    variants = [dataclasses.replace(plain, workers=2), dataclasses.replace(plain, cache="ram")]
    expected = list(TrainStream(plain.open("train"), 4, 3, 9))
    assert {key for _, key, _ in listed(expected)} == {"0002", "0005", "0007", "0009"}
    for variant in variants:
        batches = list(TrainStream(variant.open("train"), 4, 3, 9))
        assert listed(batches) == listed(expected)
        assert_equal([without_bad(batch) for batch in batches], [without_bad(batch) for batch in expected])
    first_stage = TinyFirstStage()
    latents = cache_latents(first_stage, "mark", plain.open("train"), tmp_path / "train.safetensors")
    assert first_stage.encoded == 7
    for batch, other in zip(TrainStream(latents, 4, 3, 9), expected, strict=True):
        assert batch["key"] == other["key"]
        assert batch["mean"].is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(batch["mean"], first_stage.encode(other["image"]).mean, rtol=1e-3, atol=1e-6)
        assert torch.equal(batch["semantic"], other["semantic"])
    assert listed(list(TrainStream(latents, 4, 3, 9))) == listed(expected)


def without_bad(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in (BAD, "semantic")}


def test_a_replacement_is_that_sample_with_the_crop_of_the_position(data: ShardsData) -> None:
    samples = dataclasses.replace(data, crop="random").open("train")
    order, keys = Order(samples.lengths, 3), samples.shards.keys  # type: ignore[attr-defined]
    for number, batch in enumerate(TrainStream(samples, 4, 3, 6)):
        jitter = order.draw(4 * number, 4).jitter
        index = np.array([keys.index(key) for key in batch["key"]])
        assert_equal([without_bad(batch)], [without_bad(samples[BatchIndices(index, jitter)])])
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)


def test_reasons_are_told_apart(data: ShardsData) -> None:
    reasons = {
        each.key: (each.reason, each.detail)
        for batch in EvaluationLoader(data.open("val"), 4)
        for each in batch.get(BAD, ())
    }
    assert reasons["0002"][0] == Reason.BROKEN_IMAGE
    assert reasons["0005"] == (Reason.MALFORMED_ANNOTATION, "the semantic map cannot be read as a map (unknown format)")
    assert reasons["0007"] == (Reason.MALFORMED_ANNOTATION, "the class is b'seven', not an integer")
    assert reasons["0009"] == (Reason.CAPTION_NOT_UTF8, "the caption is not UTF-8")


def test_a_latent_that_is_lost_is_no_bad_sample(data: ShardsData, tmp_path: Path) -> None:
    class Diverged(TinyFirstStage):
        def encode(self, image: torch.Tensor):  # type: ignore[no-untyped-def]
            return super().encode(image * float("nan"))

    latents = cache_latents(Diverged(), "mark", data.open("train"), tmp_path / "train.safetensors")
    with pytest.raises(
        DataError, match=r"^the latent of '0000' in .*train\.safetensors is not finite; delete the file"
    ):
        latents[BatchIndices(np.array([0]))]


def test_latents_are_cached_if_the_first_batches_are_bad(tmp_path: Path) -> None:
    broken = [dataclasses.replace(sample(i), image=b"") for i in range(40)]
    write_shard(tmp_path / "a.tar", [*broken, sample(40)])
    samples = ShardsData(str(tmp_path), size=8, workers=0).open("train")
    latents = cache_latents(TinyFirstStage(), "mark", samples, tmp_path / "train.safetensors")
    (batch,) = EvaluationLoader(latents, 64)
    assert (batch["key"], len(batch[BAD])) == (["0040"], 40)
    write_shard(tmp_path / "a.tar", broken)
    samples = ShardsData(str(tmp_path), size=8, workers=0).open("train")
    with pytest.raises(
        DataError, match=r"^40 samples in succession cannot be used, the first of them '0000' in .*a\.tar"
    ):
        cache_latents(TinyFirstStage(), "mark", samples, tmp_path / "other.safetensors")


def test_a_bad_sample_is_read_once(data: ShardsData, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def counted(image: bytes, *arguments: object) -> Image.Image:
        tried.append(image)
        return decode(image, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("ldm.data.samples.decode", counted)
    samples = data.open("train")
    list(TrainStream(samples, 4, 3, 20))
    broken = samples.shards.image(2)  # type: ignore[attr-defined]
    assert (tried.count(broken), len(tried) > 60) == (1, True)


def test_the_file_lists_a_sample_once_and_goes_on_from_its_state(tmp_path: Path) -> None:
    first, second, lost = (BadSample(Reason.BROKEN_IMAGE, f"{i}\udcff\n", "a.tar", "is, broken", i) for i in range(3))
    gone = BadSample(Reason.NO_CAPTION, "x", "a.tar")
    path = tmp_path / "vae" / "bad_samples.csv"
    file = BadSamplesFile(path)
    file.start({"train": [gone]})
    assert [file.add(3, "train", bad) for bad in (first, second, first)] == [True, True, False]
    state = file.state_dict()
    assert [file.add(4, "train", bad) for bad in (second, lost)] == [False, True]
    resumed = BadSamplesFile(path)
    resumed.load_state_dict(state)
    resumed.start({"train": [gone]})
    assert resumed.add(4, "val", first)
    assert resumed.counts("train") == {"broken image": 2}
    assert read_counts(path) == {"train": {"broken image": 2, "no caption": 1}, "val": {"broken image": 1}}


def test_a_training_without_bad_samples_has_no_file(tmp_path: Path) -> None:
    BadSamplesFile(tmp_path / "bad_samples.csv").start({"train": []})
    assert not list(tmp_path.iterdir())


def test_of_many_dropped_samples_some_are_named_and_all_are_counted() -> None:
    n = MAX_NAMED + 7
    found = dropped(Reason.NO_CAPTION, "has none", np.arange(n), [str(i) for i in range(n)], lambda i: "a.tar")
    assert (len(found), sum(each.count for each in found)) == (MAX_NAMED + 1, n)
