from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.conditioning import ConditionerConfig, SemanticConditioner
from ldm.config import from_dict
from ldm.errors import ConfigError, DataError, SamplingError

MAP = np.kron(np.array([[0, 1], [2, 2]]), np.ones((4, 4), int))  # of an image of 8 x 8, whose latents are 4 x 4


def semantic(**changes: Any) -> SemanticConditioner:
    config = from_dict(ConditionerConfig, {"kind": "semantic", "classes": 3} | changes)
    conditioner = config.resolved(None, (4, 4), 2).build()
    assert isinstance(conditioner, SemanticConditioner)
    return conditioner


def labels_of(concat: torch.Tensor) -> list[list[int]]:
    """The classes of the one-hot ``[3 h w]``; -1 where all are 0."""
    assert set(concat.unique().tolist()) <= {0.0, 1.0}
    return torch.where(concat.sum(0) == 0, -1, concat.argmax(0)).tolist()


@pytest.mark.parametrize("given", [MAP, MAP.astype(np.uint8), torch.from_numpy(MAP), MAP.tolist(), "picture"])
def test_a_map_becomes_a_channel_a_class_of_the_size_of_the_latent(given: Any) -> None:
    given = Image.fromarray(MAP.astype(np.uint8)) if isinstance(given, str) else given
    cond = semantic()({"semantic": [given]})
    assert labels_of(cond.concat[0]) == MAP[::2, ::2].tolist()
    wide = semantic()({"semantic": [np.tile(MAP, 2), None]}).concat
    assert labels_of(wide[0]) == np.tile(MAP, 2)[::2, ::2].tolist()
    assert labels_of(wide[1]) == [[-1] * 8] * 4
    assert semantic().unconditional({"semantic": [np.tile(MAP, 2)]}).concat.shape == (1, 3, 4, 8)


def test_a_place_takes_the_class_in_its_middle() -> None:
    fine = np.zeros((12, 12), int)
    fine[1::3, 1::3] = 2  # the middle of each three by three
    assert labels_of(semantic(latent_factor=3)({"semantic": [fine]}).concat[0]) == [[2] * 4] * 4


def test_no_map_is_all_zeros_and_dropping_too() -> None:
    conditioner = semantic(dropout=0.5)
    assert not conditioner.unconditional({"semantic": [MAP, MAP]}).concat.any()
    there = conditioner({"semantic": torch.from_numpy(MAP).expand(100, 8, 8)}, torch.Generator().manual_seed(0))
    kept = there.concat.flatten(1).any(1)
    assert 25 < kept.sum() < 75
    assert labels_of(there.concat[~kept][0]) == [[-1] * 4] * 4


def test_a_learnt_embedding_is_trained_and_stays_zero_without_a_map() -> None:
    conditioner = semantic(embedding=5)
    assert conditioner.config.concat_channels == 5
    conditioner({"semantic": [MAP, None]}).concat.sum().backward()
    assert conditioner.table.weight.grad[:3].all()
    assert not conditioner.table.weight.grad[3].any()
    assert not conditioner({"semantic": [None]}).concat.any()
    assert not [parameter for parameter in semantic().parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0, 3]], "image 1 has a semantic map with the value 3, but the classes are 0 to 2"),
        ([[-1, 0]], "image 1 has a semantic map with the value -1"),
        ([[0.5, 1.0]], r"a semantic map is \[h w\] of integers, not \[1, 2\] of float64"),
        (np.zeros((3, 4, 4), int), r"not \[3, 4, 4\]"),
    ],
)
def test_what_is_no_map_is_one_sentence(given: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        semantic()({"semantic": [None, given]})


def test_data_without_maps_is_refused() -> None:
    with pytest.raises(DataError, match=r"the data has none; give each sample a \.semantic\.png"):
        semantic()({"text": ["a"]})


@pytest.mark.parametrize("changes", [{"classes": 0}, {"embedding": 0}, {"dropout": -0.1}])
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        semantic(**changes)
