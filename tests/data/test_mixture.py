"""Mixtures of sources: exact shares, each source in permutations, and a sequence that can be read from any position on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import from_dict
from ldm.data.bad_samples import BAD
from ldm.data.config import DataConfig, ShardsData
from ldm.data.mixture import mixed_order, source_shares
from ldm.data.samples import SourceShare
from ldm.data.schedule import ROUND, Schedule
from ldm.data.shards import write_shard
from ldm.data.stream import TrainStream
from ldm.errors import ConfigError, DataError
from ldm.training.resume import differences
from tests.data.pictures import sample
from tests.data.test_bad_samples import WithBad
from tests.data.test_stream import Numbers, buffers

weights = st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0, 7.25]), min_size=1, max_size=4)
sources = weights.flatmap(
    lambda each: st.tuples(
        st.just(each),
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=len(each), max_size=len(each)),
    )
)
Content = tuple[list[float], list[list[int]]]


def mixed(content: Content, bad: frozenset[int] = frozenset()) -> WithBad:
    """A set of numbers from sources with weights, given by the lengths of their shards."""
    numbers = WithBad([length for shards in content[1] for length in shards], set(bad))
    numbers.mixture = [SourceShare(len(shards), weight) for weight, shards in zip(*content, strict=True)]
    return numbers


def source_of(samples: Numbers | WithBad) -> np.ndarray:
    ends = np.cumsum([source.files for source in samples.mixture])
    totals = np.cumsum(samples.lengths)[ends - 1]
    return np.searchsorted(totals, np.arange(len(samples)), "right")


@given(weights, st.integers(1, 3000), st.integers(0, 5), st.lists(st.integers(0, 50), min_size=4, max_size=4))
def test_a_schedule_keeps_exact_shares(weights: list[float], places: int, epochs: int, ahead: list[int]) -> None:
    """After whole epochs to half a place, in between to a few places, wherever it is read."""
    shares = [Fraction(str(weight)) / sum(map(Fraction, map(str, weights))) for weight in weights]
    advance = [Fraction(each, 3) for each in ahead[: len(weights)]]
    schedule = Schedule(shares, Fraction(places), 7, (1,), advance)
    wanted = [max(Fraction(0), epochs * places * share - each) for share, each in zip(shares, advance, strict=True)]
    total = sum(schedule._occurrences(epochs * -(-places // ROUND)))
    groups, before = Schedule(shares, Fraction(places), 7, (1,), advance).take(0, total + 20)
    assert before == [0] * len(weights)
    counts = np.bincount(groups[:total], minlength=len(weights))
    assert all(abs(count - each) <= Fraction(1, 2) for count, each in zip(counts.tolist(), wanted, strict=True))
    if not any(advance):
        for place in range(len(groups)):
            used = np.bincount(groups[:place], minlength=len(weights)).tolist()
            assert all(abs(n - place * each) <= 2 + len(weights) / 2 for n, each in zip(used, shares, strict=True))
    for start in (0, total // 3, total, total + 7):
        rest, before = schedule.take(start, 13)
        assert np.array_equal(rest, groups[start : start + 13])
        assert before == np.bincount(groups[:start], minlength=len(weights)).tolist()


@given(sources, st.integers(0, 9), buffers)
def test_each_source_is_read_in_permutations_and_has_its_share(content: Content, seed: int, buffer: int | None) -> None:
    samples = mixed(content)
    index = mixed_order(samples, seed, buffer)[0].draw(0, 4 * len(samples)).index
    source, shares = source_of(samples), source_shares(samples)
    for number, share in enumerate(shares):
        members = np.flatnonzero(source == number).tolist()
        read = index[source[index] == number].tolist()
        for start in range(0, len(read) - len(members), len(members)):
            assert sorted(read[start : start + len(members)]) == members
        assert abs(len(read) - share * len(index)) <= len(shares) / 2 + 1


@given(sources, buffers, st.integers(1, 5), st.integers(1, 3), st.integers(0, 30), st.data())
def test_a_mixture_depends_on_the_position_alone(
    content: Content, buffer: int | None, batch_size: int, ranks: int, start: int, data: st.DataObject
) -> None:
    """Also the replacement of bad samples, which comes from the same source."""
    source = source_of(mixed(content))
    firsts = np.unique(source, return_index=True)[1].tolist()  # the first sample of each source is good
    candidates = sorted(set(range(len(source))) - set(firsts))
    bad = data.draw(st.frozensets(st.sampled_from(candidates))) if candidates else frozenset()
    samples = mixed(content, bad)
    order = mixed_order(samples, 3, buffer)[0].draw(start, 12 * batch_size * ranks).index
    streams = []
    for rank in range(ranks):
        stream = TrainStream(samples, batch_size, 3, 12, shuffle_buffer=buffer, rank=rank, world_size=ranks)
        stream.load_state_dict({"batch": 0, "origin": start})
        streams.append(stream)
    read = [(key, batch) for batches in zip(*streams, strict=True) for batch in batches for key in batch["key"]]
    assert len(read) == len(order)
    one_by_one = TrainStream(samples, 1, 3, start + len(order), start_batch=start, shuffle_buffer=buffer)
    assert [key for key, _ in read] == [batch["key"][0] for batch in one_by_one]
    for (key, batch), i in zip(read, order.tolist(), strict=True):
        assert source[int(key)] == source[i]
        assert int(key) == i or i in {each.index for each in batch[BAD]}


@given(sources, st.integers(1, 12), st.integers(0, 60))
def test_the_shards_of_a_mixed_batch_are_announced(content: Content, buffer: int, start: int) -> None:
    samples = mixed(content)
    draw = mixed_order(samples, 3, buffer)[0].draw(start, 3)
    shard = np.repeat(np.arange(len(samples.lengths)), samples.lengths)
    assert set(shard[draw.index].tolist()[:1]) <= set(draw.ahead)
    assert len(set(draw.ahead)) == len(draw.ahead)


def test_the_sources_of_a_config_are_mixed(tmp_path: Path) -> None:
    """Without a mixture, several sources are one set; the same images have the same fingerprint either way."""
    paths = [tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / "c.tar"]
    for number, path in enumerate(paths):
        write_shard(path, [sample(i) for i in range(6 * number, 6 * number + 6)])
    node = {"kind": "shards", "size": 8, "mixture": [{"source": [str(paths[0]), str(paths[1])], "weight": 3}]}
    node["mixture"].append({"source": str(paths[2])})  # type: ignore[attr-defined]
    data = from_dict(DataConfig, node)
    assert isinstance(data, ShardsData)
    samples = data.open("train")
    plain = ShardsData(tuple(map(str, paths)), size=8).open("train")
    assert samples.fingerprint == plain.fingerprint
    batches = list(TrainStream(samples, 6, 0, 24))
    keys = Counter(key for batch in batches for key in batch["key"])
    assert sum(keys[f"{i:04d}"] for i in range(12)) == 3 * sum(keys[f"{i:04d}"] for i in range(12, 18)) == 108
    assert set(keys.values()) == {6, 9}
    memory = dataclasses.replace(data, cache="ram").open("train")
    assert [batch["key"] for batch in TrainStream(memory, 6, 0, 24)] == [batch["key"] for batch in batches]


def test_mistakes_in_a_mixture_are_explained(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data: the shards to train on are named by train or by mixture, but neither"
    ):
        from_dict(DataConfig, {"kind": "shards"}, "data")
    both = {"kind": "shards", "train": "emoji", "mixture": [{"source": "emoji"}]}
    with pytest.raises(ConfigError, match=r"by train or by mixture, but both are given; set one of them to null\.$"):
        from_dict(DataConfig, both, "data")
    with pytest.raises(ConfigError, match=r"^data\.mixture\[0\]: weight must be positive, not 0\.0\.$"):
        from_dict(DataConfig, {"kind": "shards", "mixture": [{"source": "emoji", "weight": 0}]}, "data")
    with pytest.raises(DataError, match="nowhere"):
        from_dict(DataConfig, {"kind": "shards", "mixture": [{"source": "/nowhere"}]}).open("train")


def test_a_resumed_training_keeps_its_weights_but_sources_may_move() -> None:
    def data(folder: str, weight: float) -> DataConfig:
        return from_dict(DataConfig, {"kind": "shards", "mixture": [{"source": folder, "weight": weight}]})

    assert not list(differences({"data": data("a", 1)}, {"data": data("b", 1)}))
    changes = list(differences({"data": data("a", 1)}, {"data": data("a", 2)}))
    assert changes == ["data.mixture.0.weight was 1.0 and is now 2.0"]
