from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.conditioning import ConditionerConfig
from ldm.conditioning.edges import EdgesConditioner
from ldm.config import from_dict
from ldm.errors import ConfigError, DataError, SamplingError
from ldm.modalities.edges import detect_edges

LINE = torch.zeros(8, 8)
LINE[:, 5] = 1.0  # of an image of 8 x 8, whose latents are 4 x 4


def edges(**changes: Any) -> EdgesConditioner:
    config = from_dict(ConditionerConfig, {"kind": "edges"} | changes)
    conditioner = config.resolved(None, (4, 4), 2).build()
    assert isinstance(conditioner, EdgesConditioner)
    return conditioner


def encode(_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("edges are not encoded")


def test_a_cell_has_an_edge_where_one_of_its_pixels_has() -> None:
    expected = torch.full((4, 4), -1.0)
    expected[:, 2] = 1.0
    for given in (LINE[None], [LINE]):
        assert torch.equal(edges()({"edges": given}).concat, expected[None, None])


def test_an_absent_map_differs_from_a_map_without_edges() -> None:
    concat = edges()({"edges": [torch.zeros(8, 16), None]}).concat
    assert concat.shape == (2, 1, 4, 8)
    assert (concat[0] == -1).all()
    assert not concat[1].any()
    assert edges()({"edges": [None]}).concat.shape == (1, 1, 4, 4)
    assert not edges().unconditional({"edges": [LINE]}).concat.any()


def test_dropped_maps_are_absent() -> None:
    given = {"edges": LINE.expand(100, 8, 8)}
    concat = edges(dropout=0.5)(given, torch.Generator().manual_seed(0)).concat
    kept = concat.flatten(1).any(1)
    assert 25 < kept.sum() < 75
    assert edges(dropout=0.5)(given).concat.flatten(1).any(1).all(), "none without a generator"


def test_edges_come_from_the_images_unless_the_data_has_them() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = edges().prepare_batch({"image": images}, encode, torch.Generator())
    assert torch.equal(made["edges"], detect_edges(images))
    stored = {"image": images, "edges": LINE.expand(2, 8, 8)}
    assert edges().prepare_batch(stored, encode, torch.Generator())["edges"] is stored["edges"]
    with pytest.raises(DataError, match=r"set data\.cache_latents to false"):
        edges().prepare_batch({"mean": images}, encode, torch.Generator())


def test_maps_of_several_sizes_are_refused() -> None:
    with pytest.raises(SamplingError, match="the edge maps differ in size"):
        edges()({"edges": [torch.zeros(8, 8), torch.zeros(8, 16)]})


def test_an_impossible_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match="dropout must be in"):
        edges(dropout=1.0)
