from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from ldm.config import from_dict, to_dict
from ldm.data import DataConfig, Digits, EvaluationLoader, SCurve
from ldm.errors import ConfigError, DataError, MissingExtraError


@pytest.mark.parametrize(
    "node",
    [
        {"kind": "shards", "train": "emoji", "val": ["a.tar", "b.tar"], "size": [40, 24], "cache": "ram"},
        {
            "kind": "shards",
            "train": "emoji",
            "size": 32,
            "crop": "random",
            "flip": True,
            "shuffle_buffer": 100,
        },
        "s_curve",
        "digits",
    ],
)
def test_a_section_survives_the_round_trip(node: Any) -> None:
    config = from_dict(DataConfig, node, "data")
    assert from_dict(DataConfig, to_dict(config), "data") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "ram", "crop": "random"}, "cache: ram keeps one crop"),
        ({"cache_latents": True, "flip": True}, "cache_latents keeps one latent"),
        ({"cache_latents": True, "crop": "random"}, "cache_latents keeps one latent"),
        ({"size": [64, 0]}, "size must be positive"),
        ({"workers": -1}, "workers must not be negative"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
        ({"cash": "ram"}, "did you mean 'cache'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^data: .*{message}"):
        from_dict(DataConfig, {"kind": "shards", "train": "emoji"} | settings, "data")


def test_a_split_without_a_source() -> None:
    data = from_dict(DataConfig, {"kind": "shards", "train": "emoji"}, "data")
    with pytest.raises(DataError, match=r"no val data; give its shards as data\.val"):
        data.open("val")
    with pytest.raises(DataError, match="unknown split 'vall'; did you mean 'val'"):
        data.open("vall")


def test_the_curve_is_that_of_scikit_learn_seen_from_the_side() -> None:
    """Without noise x = sin(t) and z = sign(t) (cos(t) - 1) lie on two circles around (0, -1) and (0, 1)."""
    data = SCurve(points=500, noise=0.0)
    (batch,) = EvaluationLoader(data.open("train"), 500)
    assert batch["image"].shape == (500, *data.image_shape)
    x, z = 10 * batch["image"].flatten(1).double().numpy().T
    assert np.abs(x**2 + (np.abs(z) - 1) ** 2 - 1).max() < 1e-6


def test_digits_are_split_without_overlap() -> None:
    data = Digits()
    splits = {split: data.open(split) for split in ("train", "val", "test")}
    batches = {split: next(iter(EvaluationLoader(samples, len(samples)))) for split, samples in splits.items()}
    keys = [key for batch in batches.values() for key in batch["key"]]
    assert len(keys) == len(set(keys)) == 1797
    assert len(splits["val"]) == len(splits["test"]) == 179
    for batch in batches.values():
        assert batch["image"].shape[1:] == data.image_shape
        assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
        assert sorted(set(batch["label"].tolist())) == list(range(10))


@pytest.mark.parametrize("kind", ["s_curve", "digits"])
def test_the_toy_sets_name_the_extra_that_they_need(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn.*ldm\[toy\]"):
        from_dict(DataConfig, kind, "data").open("train")
