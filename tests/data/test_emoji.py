from __future__ import annotations

from pathlib import Path

import emoji
import numpy as np
import pytest

from ldm.data.emoji import FONT_PATH, key_of, render, split_of, write_emoji_shards
from ldm.data.shards import EMOJI, SPLITS, Shards, find_shards
from ldm.data.transforms import decode
from ldm.errors import DataError

COUNTS = {"train": 3434, "val": 192, "test": 186}


@pytest.fixture(scope="module")
def shards() -> dict[str, Shards]:
    return {split: Shards(find_shards(EMOJI, split)) for split in SPLITS}


def sequence_of(key: str) -> str:
    return "".join(chr(int(code, 16)) for code in key.split("-"))


def test_the_splits_have_their_sizes(shards: dict[str, Shards]) -> None:
    assert {split: len(samples) for split, samples in shards.items()} == COUNTS
    assert len({key for samples in shards.values() for key in samples.keys}) == sum(COUNTS.values())


def test_the_shards_are_small_enough_to_ship(shards: dict[str, Shards]) -> None:
    assert sum(path.stat().st_size for samples in shards.values() for path in samples.paths) <= 16_000_000


def test_every_emoji_is_in_the_split_of_its_rule_with_its_name(shards: dict[str, Shards]) -> None:
    for split, samples in shards.items():
        for i, key in enumerate(samples.keys):
            sequence = sequence_of(key)
            assert key_of(sequence) == key
            assert split_of(sequence) == split
            assert f":{samples.text(i).replace(' ', '_')}:" == emoji.EMOJI_DATA[sequence]["en"]


def test_the_order_is_that_of_the_package(shards: dict[str, Shards]) -> None:
    place = {key_of(sequence): i for i, sequence in enumerate(emoji.EMOJI_DATA)}
    for samples in shards.values():
        places = [place[key] for key in samples.keys]
        assert places == sorted(places)


def test_what_is_held_out_differs_from_train_by_its_tones_alone(shards: dict[str, Shards]) -> None:
    def base(key: str) -> str:
        return "-".join(code for code in key.split("-") if not 0x1F3FB <= int(code, 16) <= 0x1F3FF)

    known = {base(key) for key in shards["train"].keys}
    for split in ("val", "test"):
        assert {base(key) for key in shards[split].keys} <= known


def test_pictures_are_rgb_on_white(shards: dict[str, Shards]) -> None:
    samples = shards["test"]
    for i in range(0, len(samples), 20):
        picture = decode(samples.image(i))
        assert picture.size == (128, 128)
        corners = np.asarray(picture)[::127, ::127]
        assert corners.min() >= 250


def test_a_missing_font_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"^the font .*none\.ttf is missing.*--font\.$"):
        render(FONT_PATH.with_name("none.ttf"))


def test_a_file_that_is_no_font(tmp_path: Path) -> None:
    path = tmp_path / "font.ttf"
    path.write_bytes(b"no font")
    with pytest.raises(DataError, match=r"font\.ttf is missing or cannot be opened"):
        write_emoji_shards(tmp_path, path)
    assert list(tmp_path.iterdir()) == [path]
