from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.config import from_dict
from ldm.errors import ConfigError, DataError, SamplingError
from ldm.nn.conditioning import Conditioning
from tests.tiny import TOKENIZER, TOWER

CAPTIONS = ["a red apple", "a blue sky", "two green cars"]


def text(**changes: Any) -> Conditioner:
    config = from_dict(ConditionerConfig, {"kind": "text", "tower": TOWER | {"embed_dim": 6}} | changes)
    return config.build(TOKENIZER)


def label(**changes: Any) -> Conditioner:
    return from_dict(ConditionerConfig, {"kind": "class", "classes": 4, "width": 5} | changes).build()


def test_captions_become_the_states_of_the_tower() -> None:
    conditioner = text(pooled=True)
    expected = conditioner.tower(TOKENIZER(CAPTIONS))
    cond = conditioner({"text": CAPTIONS})
    assert torch.equal(cond.context, expected.context)
    assert torch.equal(cond.vector, expected.pooled)
    assert cond.mask is None  # as in SD, padding is attended to
    assert text()({"text": CAPTIONS}).vector is None


def test_a_dropped_caption_is_the_encoded_empty_string() -> None:
    conditioner = text(dropout=0.5, pooled=True)
    captions = CAPTIONS * 30
    kept, dropped = conditioner({"text": captions}), conditioner.unconditional({"text": captions})
    cond = conditioner({"text": captions}, torch.Generator().manual_seed(0))
    is_kept = (cond.context == kept.context).flatten(1).all(1)
    is_dropped = (cond.context == dropped.context).flatten(1).all(1)
    assert (is_kept ^ is_dropped).all()
    assert torch.equal(cond.vector[is_dropped], dropped.vector[is_dropped])
    assert 25 < is_dropped.sum() < 65  # of 90, five standard deviations
    assert torch.equal(cond.context, conditioner({"text": captions}, torch.Generator().manual_seed(0)).context)
    assert torch.equal(dropped.context[0], conditioner({"text": [""]}).context[0])


def test_the_tower_gets_gradients_only_if_it_is_trained_along() -> None:
    assert not text(trainable=False)({"text": CAPTIONS}).context.requires_grad
    assert text(trainable=True)({"text": CAPTIONS}).context.requires_grad


def test_labels_are_rows_of_a_table_and_no_label_is_its_last() -> None:
    conditioner = label(dropout=0.5)
    table = conditioner.embedding.weight
    assert torch.equal(conditioner({"label": [2, 0]}).vector, table[[2, 0]])
    assert torch.equal(conditioner.unconditional({"label": [2, 0, 1]}).vector, table[[4, 4, 4]])
    labels = torch.arange(4).repeat(25)
    rows = conditioner({"label": labels}, torch.Generator().manual_seed(0)).vector
    is_dropped = (rows == table[4]).all(1)
    assert torch.equal(rows[~is_dropped], table[labels][~is_dropped])
    assert 25 < is_dropped.sum() < 75


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_label_outside_of_the_classes_is_refused(wrong: int) -> None:
    with pytest.raises(SamplingError, match=f"label {wrong} is not one of the 4 classes, 0 to 3"):
        label()({"label": [0, wrong]})


def test_data_without_labels_is_refused() -> None:
    with pytest.raises(DataError, match="the data has none"):
        label()({"text": CAPTIONS})


def test_no_condition_is_an_empty_record() -> None:
    conditioner = from_dict(ConditionerConfig, "none").build()
    for cond in (conditioner({"text": CAPTIONS}), conditioner.unconditional({})):
        assert cond == Conditioning()


@pytest.mark.parametrize(
    ("config", "widths"),
    [
        ({"kind": "text", "tower": TOWER, "pooled": True}, (16, 16)),
        ({"kind": "text", "tower": TOWER | {"embed_dim": 6}, "pooled": True}, (16, 6)),
        ({"kind": "text", "tower": TOWER}, (16, None)),
        ({"kind": "class", "classes": 3, "width": 5}, (None, 5)),
        ({"kind": "none"}, (None, None)),
    ],
)
def test_widths_are_known_before_anything_is_built(
    config: dict[str, Any], widths: tuple[int | None, int | None]
) -> None:
    kind = from_dict(ConditionerConfig, config)
    assert (kind.context_width, kind.vector_width) == widths
    cond = kind.build(TOKENIZER).unconditional({name: [None, None] for name in kind.input_keys})
    assert (None if cond.context is None else cond.context.shape[-1]) == widths[0]
    assert (None if cond.vector is None else cond.vector.shape[-1]) == widths[1]


@pytest.mark.parametrize("config", [{"kind": "text", "dropout": 1.0}, {"kind": "class", "classes": 0}])
def test_impossible_conditioners_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        from_dict(ConditionerConfig, config)
