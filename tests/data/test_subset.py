from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldm.data import ShardsData
from ldm.data.filters import FilterConfig, SubsetConfig
from ldm.data.mixture import WeightedSource
from ldm.data.samples import BatchIndices, Samples
from ldm.errors import ConfigError

DATA = ShardsData("emoji", val="emoji", size=8, workers=0)


def keys(samples: Samples) -> set[str]:
    return set(samples.annotations(BatchIndices(np.arange(len(samples))))["key"])


def test_a_smaller_subset_is_a_part_of_a_larger_one_with_the_same_seed() -> None:
    every = DATA.open("train")
    sets = {n: replace(DATA, subset=SubsetConfig(n, seed=3)).open("train") for n in (50, 200, 10**6)}
    assert {n: len(each) for n, each in sets.items()} == {50: 50, 200: 200, 10**6: len(every)}
    assert keys(sets[50]) < keys(sets[200]) < keys(every)
    assert keys(replace(DATA, subset=SubsetConfig(200, seed=4)).open("train")) != keys(sets[200])
    assert len({each.fingerprint for each in sets.values()}) == 3
    assert sets[10**6].fingerprint == every.fingerprint


def test_only_the_training_samples_that_filters_leave_are_chosen_from_and_counted() -> None:
    short = FilterConfig(max_caption_length=12, splits=("train",))
    data = replace(DATA, filters=short, subset=SubsetConfig(100))
    train, filtered = data.open("train"), replace(DATA, filters=short).open("train")
    assert keys(train) < keys(filtered)
    assert len(data.open("val")) == len(replace(DATA, filters=short).open("val"))
    assert train.selection is not None
    assert (train.selection.kept, len(train)) == (100, 100)
    assert train.selection.dropped[-1].filter == "subset: 100"


def test_a_mixture_has_no_subset_since_a_small_source_could_be_missing() -> None:
    mixture = (WeightedSource("emoji"), WeightedSource("emoji"))
    assert replace(DATA, train=None, mixture=mixture).with_subset(100, seed=0) is None
    assert DATA.with_subset(100, seed=0) is not None


def test_a_subset_needs_an_image() -> None:
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        SubsetConfig(0)
