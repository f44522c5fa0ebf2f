from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from ldm.data import BatchIndices, Shapes
from ldm.data.shapes import COLOURS, GROUND
from ldm.errors import ConfigError, DataError


def test_all_that_is_said_of_a_picture_is_true() -> None:
    data = Shapes(samples=60, size=16, shapes=4)
    batch = data.open("train")[BatchIndices(np.arange(60))]
    palette = torch.tensor([(GROUND,) * 3, *COLOURS.values()]) / 127.5 - 1
    torch.testing.assert_close(batch["image"], palette[batch["semantic"]].permute(0, 3, 1, 2), atol=1e-6, rtol=0)
    assert batch["image"].shape[1:] == data.image_shape
    counts = set()
    for text, label, boxes, semantic in zip(
        batch["text"], batch["label"].tolist(), batch["boxes"], batch["semantic"], strict=True
    ):
        drawn = torch.zeros(16, 16, dtype=torch.int64)
        for colour, x0, y0, x1, y1 in boxes:
            assert not drawn[int(16 * y0) : int(16 * y1), int(16 * x0) : int(16 * x1)].any(), "apart from each other"
            drawn[int(16 * y0) : int(16 * y1), int(16 * x0) : int(16 * x1)] = colour + 1
        assert torch.equal(drawn, semantic)
        names = [list(COLOURS)[colour] for colour, *_ in boxes]
        assert [word.strip(",") for word in text.split() if word.strip(",") in COLOURS] == names
        assert len(set(names)) == len(names)
        assert label == boxes[0][0]
        counts.add(len(boxes))
    assert counts == {1, 2, 3, 4}


def test_captions_are_english() -> None:
    texts = Shapes(samples=60, shapes=3).open("train").all_annotations()["text"]
    by_length = {text.count(" a "): text for text in texts}
    patterns = {0: r"a \w+ rectangle", 1: r"a \w+ and a \w+ rectangle", 2: r"a \w+, a \w+ and a \w+ rectangle"}
    for others, pattern in patterns.items():
        assert re.fullmatch(pattern, by_length[others])


def test_a_picture_depends_on_seed_split_and_number_alone() -> None:
    draw = BatchIndices(np.arange(5))
    few, many, other = (Shapes(samples=n, seed=seed) for n, seed in ((5, 0), (9, 0), (5, 1)))
    assert torch.equal(few.open("train")[draw]["image"], many.open("train")[draw]["image"])
    assert not torch.equal(few.open("train")[draw]["image"], few.open("val")[draw]["image"])
    assert not torch.equal(few.open("train")[draw]["image"], other.open("train")[draw]["image"])


@pytest.mark.parametrize("settings", [{"samples": 0}, {"size": 4}, {"shapes": 0}, {"shapes": 5}])
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="samples must be at least 1"):
        Shapes(**settings)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="unknown split 'vall'; did you mean 'val'"):
        Shapes().open("vall")
