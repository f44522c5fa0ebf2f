"""Aspect buckets: the table of shapes, batches of one shape in which all samples are used equally often, and their images."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.cli.prepare import app
from ldm.config import from_dict
from ldm.data.bad_samples import BAD
from ldm.data.bucket_order import order_of
from ldm.data.buckets import BucketConfig, Buckets, image_sizes, nearest
from ldm.data.config import DataConfig, ShardsData
from ldm.data.latents import cache_latents
from ldm.data.samples import Batch, BatchIndices, SourceShare, StoredImages
from ldm.data.shards import Sample, write_shard
from ldm.data.stream import EvaluationLoader, TrainStream
from ldm.errors import ConfigError, DataError
from tests.data.pictures import encoded, noise_picture
from tests.data.test_bad_samples import WithBad
from tests.data.test_latents import TinyFirstStage
from tests.data.test_stream import assert_equal, buffers

SHAPES = BucketConfig(8, 2.5).table(64, 64)


class Bucketed(WithBad):
    """A set of numbers in buckets, some of which are bad; batches also say their shape."""

    def __init__(self, of: list[int], bad: set[int] = frozenset(), files: int = 1):  # type: ignore[assignment]
        super().__init__([len(part) for part in np.array_split(of, files)], set(bad))
        self.of = np.array(of, np.uint8)

    def buckets(self) -> Buckets:
        return Buckets(SHAPES, self.of)

    def __getitem__(self, draw: BatchIndices) -> Batch:
        batch = super().__getitem__(draw)
        return {**batch, "shape": [draw.shape] * len(batch["key"])} if "key" in batch else batch


sets = st.lists(st.integers(0, len(SHAPES) - 1), min_size=1, max_size=40)


@given(st.sampled_from([8, 16, 32, 64]), st.integers(1, 16), st.integers(1, 16), st.floats(1.01, 9))
def test_the_table_has_shapes_of_about_the_area_of_the_size(step: int, down: int, across: int, aspect: float) -> None:
    height, width = step * down, step * across
    shapes = BucketConfig(step, aspect).table(height, width)
    assert (height, width) in shapes
    assert all(h % step == w % step == 0 and h * w <= height * width for h, w in shapes)
    assert all((h + step) * w > height * width or h * (w + step) > height * width for h, w in shapes)
    aspects = [w / h for h, w in shapes]
    assert aspects == sorted(set(aspects))
    assert all(1 / aspect <= each <= aspect for each in aspects if each != width / height)
    assert {(w, h) for h, w in shapes} ^ {*shapes} <= {(height, width), (width, height)}


def test_the_tables_of_common_sizes() -> None:
    assert BucketConfig().table(512, 512) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    sdxl = BucketConfig(64, 4).table(1024, 1024)
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1536), (512, 2048)} < set(sdxl)
    message = (
        r"^data: size is 500 x 500, whose sides are not multiples of buckets\.step, which is 64; change one of them\.$"
    )
    with pytest.raises(ConfigError, match=message):
        from_dict(DataConfig, {"kind": "shards", "train": "a", "size": 500, "buckets": {}}, "data")
    with pytest.raises(ConfigError, match=r"buckets\.step is 1, which gives \d+ shapes, more than 256; raise it\.$"):
        BucketConfig(1).table(512, 512)


def test_shapes_may_be_given_as_a_list(tmp_path: Path) -> None:
    """In any order and without data.size; a broken image goes to the bucket that is nearest to data.size."""
    config = from_dict(
        DataConfig,
        {"kind": "shards", "train": str(tmp_path), "size": 32, "buckets": {"shapes": [[24, 48], [40, 24], [16, 64]]}},
    )
    assert config.bucket_shapes == ((40, 24), (24, 48), (16, 64))
    samples = [
        Sample(str(i), "a", encoded(Image.new("RGB", size)), "png")
        for i, size in enumerate([(30, 60), (60, 30), (60, 15)])
    ]
    write_shard(tmp_path / "0.tar", [*samples, Sample("3", "b", b"broken", "png")])
    buckets = config.open("train").buckets()
    assert buckets is not None
    assert buckets.of.tolist() == [0, 1, 2, 0]
    assert config.open("train")[BatchIndices(np.array([1]), shape=(24, 48))]["image"].shape == (1, 3, 24, 48)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ({"shapes": []}, "shapes lists 0 shapes; give from 1 to 256"),
        ({"shapes": [[0, 8]]}, r"shapes is \[\[0, 8\]\]; the sides must be at least 1 pixel"),
        ({"shapes": [[8, 16], [16, 32]]}, r"lists \[8, 16\] and \[16, 32\], which have the same aspect ratio"),
        ({"shapes": [[8, 16]], "step": 8}, "step and max_aspect have no effect on shapes that are given"),
        ({"shapes": [[8, 16, 3]]}, r"shapes\[0\]: expected 2 values, found 3"),
        ({"shapes": [8, 16]}, r"shapes\[0\]: expected a list, found 8"),
    ],
)
def test_lists_of_shapes_that_cannot_be_used_are_refused(buckets: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(DataConfig, {"kind": "shards", "train": "a", "size": 32, "buckets": buckets}, "data")


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1))
def test_an_image_is_in_the_bucket_of_the_nearest_aspect_ratio(sizes: list[tuple[int, int]]) -> None:
    width, height = np.array(sizes).T
    distance = np.abs(np.log([[w / h for h, w in SHAPES]]) - np.log(width / height)[:, None])
    found = nearest(SHAPES, width, height)
    assert np.allclose(distance[np.arange(len(sizes)), found], distance.min(1), atol=1e-12)


@given(sets, st.integers(1, 9), st.integers(0, 4), buffers, st.integers(1, 3), st.booleans())
def test_every_batch_is_of_one_shape_and_all_samples_are_used_equally_often(
    of: list[int], batch: int, epochs: int, buffer: int | None, files: int, mixed: bool
) -> None:
    """Each bucket is read in permutations, and after whole epochs it has its share to half of a batch."""
    samples = Bucketed(of, files=min(files, len(of)))
    share = np.full(len(of), Fraction(1, len(of)), object)  # of each sample in the training
    if mixed and len(samples.lengths) > 1:
        samples.mixture = [SourceShare(1, 2.0), SourceShare(len(samples.lengths) - 1, 1.0)]
        first = samples.lengths[0]
        share[:first], share[first:] = Fraction(2, 3 * first), Fraction(1, 3 * (len(of) - first))
    order = order_of(samples, 5, buffer, [(0, batch)])
    batches = epochs * len(of) // batch
    read: dict[int, list[int]] = {}
    for number in range(batches):
        draw = order.draw(number * batch, batch)
        (bucket,) = set(samples.of[draw.index].tolist())
        assert draw.shape == SHAPES[bucket]
        read.setdefault(bucket, []).extend(draw.index.tolist())
    for bucket in set(of):
        members, used = np.flatnonzero(samples.of == bucket), read.get(bucket, [])
        # A round ends up to half a batch for each bucket before or after the batches that are exact epochs.
        assert abs(len(used) - batches * batch * sum(share[members])) <= batch * (1 + len(set(of)) / 2)
        if not samples.mixture:
            for start in range(0, len(used), len(members)):
                permutation = used[start : start + len(members)]
                assert len(set(permutation)) == len(permutation)
        counts = Counter(used)
        for i, j in itertools.pairwise(members.tolist()):
            if share[i] == share[j]:
                assert abs(counts[i] - counts[j]) <= 1


@given(sets, st.integers(1, 4), st.integers(1, 3), st.integers(0, 15), buffers)
def test_an_order_in_buckets_depends_on_the_batch_number_alone(
    of: list[int], batch_size: int, ranks: int, start: int, buffer: int | None
) -> None:
    def stream(rank: int, ranks: int, size: int, first: int) -> TrainStream:
        place = {"rank": rank, "world_size": ranks, "shuffle_buffer": buffer}
        return TrainStream(Bucketed(of), size, 3, 20, start_batch=first, **place)

    whole = list(stream(0, 1, batch_size * ranks, 0))
    parts = [list(stream(rank, ranks, batch_size, start)) for rank in range(ranks)]
    for expected, *found in zip(whole[start:], *parts, strict=True):
        assert expected["key"] == [key for batch in found for key in batch["key"]]
        assert expected["text"] == [text for batch in found for text in batch["text"]]  # the jitter
        assert len({shape for batch in found for shape in batch["shape"]}) == 1


@pytest.mark.parametrize("mixed", [False, True])
def test_all_buckets_read_the_same_shards_at_a_time(mixed: bool) -> None:
    """With a shuffle buffer, so that each remote shard is copied once for all of them."""
    shares = np.arange(1, len(SHAPES) + 1) / sum(range(len(SHAPES) + 1))
    samples = Bucketed(np.random.default_rng(0).choice(len(SHAPES), 4000, p=shares).tolist(), files=80)
    if mixed:
        samples.mixture = [SourceShare(40, 1.0), SourceShare(40, 1.0)]
    order, shard = order_of(samples, 3, 200, [(0, 8)]), np.repeat(np.arange(80), samples.lengths)
    draws = [
        order.draw(8 * number, 8) for number in range(450)
    ]  # of the 500 of an epoch: some buckets end before others
    used = [set(shard[draw.index].tolist()) for draw in draws]
    announced = [set(draw.ahead) & shards for draw, shards in zip(draws, used, strict=True)]
    assert sum(map(len, announced)) > 0.9 * sum(map(len, used))
    for each in range(80):
        numbers = [number for number, shards in enumerate(used) if each in shards]
        span = max(numbers, default=0) - min(numbers, default=0)
        assert span <= 2 * 25 + 2 / min(shares)  # two blocks of the buffer, and two batches of the rarest bucket


@given(sets, st.lists(st.tuples(st.integers(1, 9), st.integers(0, 7)), min_size=2, max_size=4), st.integers(0, 3))
def test_another_batch_size_continues_each_bucket_at_the_sample_it_had_come_to(
    of: list[int], sessions: list[tuple[int, int]], epochs: int
) -> None:
    """As often as it changes; the buckets have their shares as if it had not."""
    samples, position, history = Bucketed(of), 0, None
    sessions = [*sessions, (sessions[-1][0], epochs * len(of) // sessions[-1][0])]
    read: dict[int, list[int]] = {}
    for size, count in sessions:
        stream = TrainStream(samples, size, 3, 1000)
        # As the engine continues a checkpoint: the position stays, whatever the number of batches.
        stream.load_state_dict({"batch": 0, "origin": position, **({"history": history} if history else {})})
        for batch in itertools.islice(stream, count):
            keys = [int(key) for key in batch["key"]]
            read.setdefault(int(samples.of[keys[0]]), []).extend(keys)
            position += size
        history = stream.state_dict()["history"]
    for bucket, used in read.items():
        expected = order_of(samples, 3, None, [(0, len(used))])._parts  # type: ignore[attr-defined]
        filled = [number for number, count in enumerate(samples.buckets().counts()) if count]
        assert used == expected[filled.index(bucket)].draw(0, len(used)).index.tolist()
    largest = max(size for size, _ in sessions)
    for bucket in set(of):
        share = of.count(bucket) / len(of)
        assert abs(len(read.get(bucket, [])) - share * position) <= largest * (2 + len(set(of)))


@given(sets, st.integers(1, 6), buffers, st.data())
def test_a_bad_sample_is_replaced_from_its_bucket(
    of: list[int], size: int, buffer: int | None, data: st.DataObject
) -> None:
    """From the next one in aspect ratio if all samples of the bucket are bad."""
    bad = data.draw(st.sets(st.integers(0, len(of) - 1), max_size=len(of) - 1))
    samples = Bucketed(of, bad)
    good = [of[i] for i in range(len(of)) if i not in bad]
    plain, replaced = (list(TrainStream(each, size, 3, 12, shuffle_buffer=buffer)) for each in (Bucketed(of), samples))
    for batch, expected in zip(replaced, plain, strict=True):
        assert batch["shape"] == expected["shape"]
        assert batch["text"] == expected["text"]
        bucket = of[int(expected["key"][0])]
        for key, before in zip(batch["key"], expected["key"], strict=True):
            assert key == before or int(before) in bad
            assert int(key) not in bad
            distance = {abs(each - bucket) for each in good}
            if bucket in good:
                assert of[int(key)] == bucket
            elif max(Counter(of).values()) == 1:
                assert abs(of[int(key)] - bucket) == min(distance)
        assert {each.index for each in batch.get(BAD, ())} <= bad


@given(sets, st.integers(1, 5), st.integers(1, 3))
def test_validation_has_every_sample_once_in_batches_of_one_shape(of: list[int], size: int, ranks: int) -> None:
    samples = Bucketed(of)
    loaders = [EvaluationLoader(samples, size, rank=rank, world_size=ranks, bucketed=True) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    seen = []
    for number, parts in enumerate(zip(*batches, strict=True)):
        assert len({shape for part in parts for shape in part["shape"]}) == 1
        keys = [key for part, loader in zip(parts, loaders, strict=True) if loader.rows(number) for key in part["key"]]
        assert len(keys) == loaders[0].size(number)
        seen.append(keys)
    assert sorted(int(key) for keys in seen for key in keys) == list(range(len(of)))
    assert seen == [batch["key"] for batch in EvaluationLoader(samples, size * ranks, bucketed=True)]
    assert [batch["shape"][0] for batch in EvaluationLoader(samples, size)] == [None] * math.ceil(len(of) / size)


ASPECTS = [(40, 40), (60, 30), (30, 60), (80, 10), (41, 39), (20, 36)]  # width, height


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardsData:
    """Images of several aspect ratios with a box over the right half and an equal edge map, white to the right."""
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for i in range(18):
        width, height = ASPECTS[i % len(ASPECTS)]
        half = Image.new("L", (width, height))
        half.paste(255, (width // 2, 0, width, height))
        boxes = json.dumps([[0, 0.5, 0.0, 1.0, 1.0]])
        conditions = {"boxes": json.loads(boxes), "edges": half}
        samples.append(Sample(f"{i:02d}", f"caption {i}", encoded(half.convert("RGB")), "png", conditions))
    write_shard(folder / "0.tar", samples[:11])
    write_shard(folder / "1.tar", samples[11:])
    return ShardsData(
        str(folder), val=str(folder), size=32, buckets=BucketConfig(8), sizes=True, crop="random", flip=True, workers=0
    )


def test_annotations_follow_the_crop_of_the_bucket(data: ShardsData) -> None:
    shapes = set()
    for batch in TrainStream(data.open("train"), 4, 3, 30):
        height, width = batch["image"].shape[-2:]
        shapes.add((height, width))
        assert batch["edges"].shape[1:] == (height, width)
        assert torch.allclose(batch["edges"], batch["image"][:, 0] / 2 + 0.5, atol=0.01)
        for row, key in enumerate(batch["key"]):
            original = ASPECTS[int(key) % len(ASPECTS)]
            assert batch["original_size"][row] == original[::-1]
            top, left = batch["crops_coords_top_left"][row]
            scale = max(width / original[0], height / original[1])
            assert 0 <= top <= round(scale * original[1] - height)
            assert 0 <= left <= round(scale * original[0] - width)
            bright = (batch["image"][row, 0] > 0).float().mean(0).round().nonzero().flatten().tolist()
            if bright:
                ((_, x0, y0, x1, y1),) = batch["boxes"][row]
                assert (y0, y1) == (0, 1)
                assert abs(x0 * width - bright[0]) <= 1
                assert abs(x1 * width - bright[-1] - 1) <= 1
    assert shapes == {(32, 32), (24, 40), (40, 24)}


def test_the_buckets_follow_from_the_index_as_from_the_images(data: ShardsData, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    folder = Path(str(data.train))
    without = data.open("train")
    index = tmp_path / "index.parquet"
    result = CliRunner().invoke(app, ["index", str(folder), "--out", str(index)])
    assert result.exit_code == 0, result.output
    samples = dataclasses.replace(data, train=str(index)).open("train")
    assert isinstance(samples, StoredImages)
    width, height = image_sizes(samples.shards, lambda i: pytest.fail(f"the size of image {i} was read"))
    assert list(zip(width.tolist(), height.tolist(), strict=True)) == 3 * ASPECTS
    assert_same(list(TrainStream(samples, 4, 3, 6)), list(TrainStream(without, 4, 3, 6)))


def test_sources_with_and_without_an_index_have_buckets_together(data: ShardsData, tmp_path: Path) -> None:
    from ldm.data.indexing import make_index

    folders = [tmp_path / "indexed", tmp_path / "plain"]
    for folder in folders:
        shutil.copytree(str(data.train), folder)
    make_index(str(folders[0]), workers=1)
    sources = tuple(map(str, folders))
    buckets = dataclasses.replace(data, train=sources).open("train").buckets()
    alone = data.open("train").buckets()
    assert buckets is not None
    assert alone is not None
    assert buckets.of.tolist() == 2 * alone.of.tolist()


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.pop("edges"), other.pop("edges"))
    assert_equal(a, b)


def test_memory_and_workers_give_the_same_batches(data: ShardsData) -> None:
    plain = dataclasses.replace(data, crop="center")
    expected = list(TrainStream(plain.open("train"), 4, 3, 12))
    for changes in ({"cache": "ram"}, {"workers": 2}):
        samples = dataclasses.replace(plain, **changes).open("train")
        batches = list(TrainStream(samples, 4, 3, 12))
        assert_same(batches, [dict(batch) for batch in expected])
        loaded = list(EvaluationLoader(samples, 4, bucketed=True))
        assert_same(loaded, list(EvaluationLoader(plain.open("train"), 4, bucketed=True)))
    assert next(iter(EvaluationLoader(samples, 4)))["image"].shape[-2:] == (32, 32)


def test_latents_are_cached_in_the_shape_of_their_bucket(data: ShardsData, tmp_path: Path) -> None:
    """Previews, which have the size of the set, receive images."""
    stored = dataclasses.replace(data, crop="center", flip=False).open("train")
    first_stage = TinyFirstStage().eval()
    cached = cache_latents(first_stage, "mark", stored, tmp_path / "train.safetensors")
    pictures = list(TrainStream(stored, 4, 3, 12))
    for batch, expected in zip(TrainStream(cached, 4, 3, 12), pictures, strict=True):
        assert batch["key"] == expected["key"]
        assert batch["crops_coords_top_left"] == expected["crops_coords_top_left"]
        posterior = first_stage.encode(expected["image"])
        torch.testing.assert_close(batch["mean"], posterior.mode, rtol=1e-3, atol=1e-3)
    assert {batch["image"].shape for batch in pictures} == {(4, 3, 32, 32), (4, 3, 24, 40), (4, 3, 40, 24)}
    loaded = EvaluationLoader(cached, 4, bucketed=True)
    assert sorted(key for batch in loaded for key in batch["key"]) == [f"{i:02d}" for i in range(18)]
    (batch,) = EvaluationLoader(cached, 18)
    assert batch["image"].shape == (18, 3, 32, 32)


def test_cached_latents_have_the_bad_samples_of_the_images(tmp_path: Path) -> None:
    sides = [(30, 60), (60, 30), (60, 30), (32, 32)]
    images = [encoded(noise_picture(i, height, width)) for i, (width, height) in enumerate(sides)]
    images[0], images[2] = images[0][:500], images[2][:500]  # the header is whole; the first bucket has no good sample
    write_shard(tmp_path / "a.tar", (Sample(f"{i}", "a", image, "png", {}) for i, image in enumerate(images)))
    stored = ShardsData(str(tmp_path), size=32, buckets=BucketConfig(8), workers=0).open("train")
    assert stored.buckets().counts() == [1, 1, 2]  # type: ignore[union-attr]
    cached = cache_latents(TinyFirstStage().eval(), "mark", stored, tmp_path / "train.safetensors")
    batches = [list(EvaluationLoader(each, 2, bucketed=True)) for each in (stored, cached)]
    for batch, expected in zip(*batches, strict=True):
        assert (batch["key"], batch.get(BAD)) == (expected["key"], expected.get(BAD))
    assert {key for batch in TrainStream(stored, 2, 3, 12) for key in batch["key"]} == {"1", "3"}
    message = r"^none of the 1 images of the bucket 40 x 24 can be used, and latents of other shapes are not cached;"
    with pytest.raises(DataError, match=message):
        list(TrainStream(cached, 2, 3, 12))


def test_an_image_without_a_size_is_a_bad_sample(tmp_path: Path) -> None:
    file = io.BytesIO()
    noise_picture(1, 30, 20).save(file, "PNG")
    images = [encoded(noise_picture(0, 30, 60)), file.getvalue(), b"no image"]
    write_shard(tmp_path / "a.tar", (Sample(f"{i}", "a", image, "png", {}) for i, image in enumerate(images)))
    samples = ShardsData(str(tmp_path), size=32, buckets=BucketConfig(8), workers=0).open("train")
    assert samples.buckets().counts() == [1, 1, 1]  # type: ignore[union-attr]
    batches = list(TrainStream(samples, 2, 3, 12))
    assert {key for batch in batches for key in batch["key"]} == {"0", "1"}
    assert {bad.key for batch in batches for bad in batch.get(BAD, ())} == {"2"}
