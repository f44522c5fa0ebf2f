"""Choice of captions: by weight, tags shuffled and dropped, as a function of the position in training alone."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.config import from_dict
from ldm.data.bad_samples import Reason, SampleError
from ldm.data.caption_choice import MAX_BYTES, CaptionConfig
from ldm.data.config import ShardsData
from ldm.data.latents import cache_latents
from ldm.data.order import Order
from ldm.data.samples import BatchIndices
from ldm.data.shards import write_shard
from ldm.data.stream import EvaluationLoader, TrainStream
from ldm.errors import ConfigError
from tests.data.pictures import sample
from tests.data.test_latents import TinyFirstStage

DRAWS = Order([4000], 0).draw(0, 4000).jitter
LINES, JSON = CaptionConfig("lines"), CaptionConfig("json")
NAMED = CaptionConfig("json", {"long": 4, "short": 1, "none": 2})


def chosen(config: CaptionConfig, member: str) -> list[str]:
    """The captions of 4000 uses of a sample."""
    captions = config.parse(member.encode())
    assert DRAWS is not None
    return [config.choose(captions, row) for row in DRAWS]


@pytest.mark.parametrize(
    ("config", "member", "expected"),
    [
        (CaptionConfig(), "one\ntwo", {"one\ntwo": 1}),
        (LINES, "one\n\n two \r\n", {"one": 0.5, "two": 0.5}),
        (JSON, '"one"', {"one": 1}),
        (JSON, '["one", "two", "one"]', {"one": 2 / 3, "two": 1 / 3}),
        (
            JSON,
            '[{"text": "one", "weight": 3}, {"text": "two"}, {"text": "no", "weight": 0}]',
            {"one": 0.75, "two": 0.25},
        ),
        (JSON, '{"short": "one", "long": "two"}', {"one": 0.5, "two": 0.5}),
        (
            CaptionConfig("json", {"long": 4, "short": 1, "none": 2}),
            '{"short": "one", "long": "two", "alt": "no"}',
            {"one": 0.2, "two": 0.8},
        ),
    ],
)
def test_captions_are_chosen_by_weight(config: CaptionConfig, member: str, expected: dict[str, float]) -> None:
    counts = Counter(chosen(config, member))
    assert counts.keys() == expected.keys()
    for caption, share in expected.items():
        assert abs(counts[caption] / 4000 - share) < 0.04  # five standard deviations


def test_validation_uses_the_first_caption_unchanged() -> None:
    config = CaptionConfig("json", {"long": 1, "short": 5}, shuffle_tags=True, drop_tags=1.0)
    assert config.choose(config.parse(b'{"short": "b,a", "long": "d,  c"}'), None) == "d,  c"


def test_tags_are_shuffled_and_dropped_behind_the_first() -> None:
    config = CaptionConfig(shuffle_tags=True, drop_tags=0.25, keep_tags=2)
    found = [text.split(", ") for text in chosen(config, "a,b , c,d, e,,f")]
    assert all(tags[:2] == ["a", "b"] and {*tags[2:]} <= {*"cdef"} and len({*tags}) == len(tags) for tags in found)
    assert abs(np.mean([len(tags) - 2 for tags in found]) / 4 - 0.75) < 0.02
    firsts = Counter(tags[2] for tags in found if len(tags) > 2)
    assert min(firsts.values()) > 0.8 * max(firsts.values())
    assert all(sorted(tags[2:]) == list("cdef") for tags in found if len(tags) == 6)


def test_dropped_tags_keep_their_order_without_shuffling() -> None:
    found = {*chosen(CaptionConfig(drop_tags=0.5, separator=" "), "a b c")}
    assert found == {"", "a", "b", "c", "a b", "a c", "b c", "a b c"}


@pytest.mark.parametrize(
    ("config", "member", "reason"),
    [
        (CaptionConfig(), b"a" * (MAX_BYTES + 1), Reason.CAPTION_TOO_LONG),
        (LINES, b"caf\xe9", Reason.CAPTION_NOT_UTF8),
        *(
            (JSON, member, Reason.MALFORMED_CAPTION)
            for member in (b"{", b"3", b"[1]", b"[]", b'[{"weight": 2}]', b"[" * 9999)
        ),
        *(
            (JSON, member, Reason.MALFORMED_CAPTION)
            for member in (b'[{"text": "a", "weight": "b"}]', b'{"a": ["b"]}', b'[" "]')
        ),
        (JSON, b'[{"text": "a", "weight": Infinity}]', Reason.MALFORMED_CAPTION),
        (CaptionConfig("json", {"long": 1}), b'{"short": "a"}', Reason.MALFORMED_CAPTION),
    ],
)
def test_members_that_hold_no_captions_are_bad_samples(config: CaptionConfig, member: bytes, reason: Reason) -> None:
    with pytest.raises(SampleError) as error:
        config.parse(member)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"drop_tags": 2}, "drop_tags must be from 0 to 1"),
        ({"keep_tags": -1}, "keep_tags must not be negative"),
        ({"separator": ""}, "separator must not be empty"),
        ({"weights": {"a": 1}}, "weights need format: json, but format is text"),
        ({"format": "json", "weights": {"a": 0}}, "one must be positive"),
    ],
)
def test_settings_without_a_meaning_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ShardsData, {"train": "a.tar", "captions": section})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardsData:
    folder = tmp_path_factory.mktemp("shards")
    captions = [json.dumps([f"{i}, a, b, c, d", f"other {i}"]) for i in range(12)]
    write_shard(folder / "a.tar", [dataclasses.replace(sample(i), text=captions[i]) for i in range(12)])
    captions_config = CaptionConfig("json", shuffle_tags=True, drop_tags=0.2, keep_tags=1)
    return ShardsData(str(folder), val=str(folder), size=8, workers=0, captions=captions_config)


def test_the_choice_depends_on_the_position_alone(data: ShardsData, tmp_path: Path) -> None:
    """With any number of workers and ranks, from memory and with cached latents, wherever the training was resumed."""
    plain = data.open("train")
    used = [text for batch in TrainStream(plain, 4, 3, 9) for text in batch["text"]]
    assert len({*used}) > 24
    latents = cache_latents(TinyFirstStage(), "mark", plain, tmp_path / "train.safetensors")
    workers, memory = (
        dataclasses.replace(data, **change).open("train") for change in ({"workers": 2}, {"cache": "ram"})
    )
    for samples in (latents, workers, memory):
        assert [text for batch in TrainStream(samples, 4, 3, 9) for text in batch["text"]] == used
    ranks = [TrainStream(plain, 2, 3, 9, start_batch=5, rank=rank, world_size=2) for rank in range(2)]
    assert [text for batches in zip(*ranks, strict=True) for batch in batches for text in batch["text"]] == used[20:]


def test_validation_gets_the_first_caption_and_tokenizers_all(data: ShardsData) -> None:
    expected = [f"{i}, a, b, c, d" for i in range(12)]
    for cache in ("none", "ram"):
        samples = dataclasses.replace(data, cache=cache).open("val")
        assert [text for batch in EvaluationLoader(samples, 5) for text in batch["text"]] == expected
        assert samples.all_captions("a test") == [
            text for i, text in enumerate(expected) for text in (text, f"other {i}")
        ]
        assert samples.annotations(BatchIndices(np.array([3, 1])))["text"] == [expected[3], expected[1]]


def test_words_are_dropped_and_one_stays() -> None:
    counts = Counter(chosen(CaptionConfig(drop_words=0.5), "a  red\nmug"))
    assert set(counts) == {"a", "red", "mug", "a red", "a mug", "red mug", "a red mug"}
    assert counts["a red mug"] / 4000 == pytest.approx(1 / 8, abs=0.02)
    for word in ("a", "red", "mug"):  # alone by chance, or as the one of none that stays
        assert counts[word] / 4000 == pytest.approx(1 / 8 + 1 / 24, abs=0.025)
    assert set(chosen(CaptionConfig(drop_words=1.0), "one two")) == {"one", "two"}
    assert set(chosen(CaptionConfig(drop_words=1.0), "")) == {""}


def test_captions_are_put_into_templates_of_equal_chance() -> None:
    config = CaptionConfig("lines", templates=("a photo of {}", "{}, {}"))
    counts = Counter(chosen(config, "one\ntwo"))
    assert set(counts) == {"a photo of one", "one, one", "a photo of two", "two, two"}
    assert all(count / 4000 == pytest.approx(0.25, abs=0.03) for count in counts.values())
    assert config.choose(config.parse(b"one\ntwo"), None) == "one"
    assert config.in_templates(["one", "two"]) == ["one", "two", "a photo of one", "one, one"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drop_words": 1.5}, "drop_words must be from 0 to 1, but is 1.5"),
        ({"templates": ["a photo"]}, r"the template 'a photo' has no \{\}, which the caption replaces"),
    ],
)
def test_impossible_augmentations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(CaptionConfig, values)
