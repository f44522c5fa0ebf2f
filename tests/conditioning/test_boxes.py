from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.conditioning import BoxesConditioner, ConditionerConfig
from ldm.conditioning.boxes import fourier_features
from ldm.config import from_dict
from ldm.errors import ConfigError, DataError, SamplingError
from ldm.nn.attention import Attention

RED, BLUE = (0, 0.0, 0.0, 0.5, 0.5), (2, 0.25, 0.5, 1.0, 1.0)


def boxes(**changes: Any) -> BoxesConditioner:
    config = {"kind": "boxes", "classes": 3, "max_boxes": 4, "width": 8} | changes
    conditioner = from_dict(ConditionerConfig, config).build()
    assert isinstance(conditioner, BoxesConditioner)
    return conditioner


def test_a_box_is_a_token_whatever_stands_beside_it() -> None:
    conditioner = boxes()
    both, alone = conditioner({"boxes": [[RED, BLUE]]}), conditioner({"boxes": [[BLUE]]})
    assert both.context.shape == (1, 5, 8)
    assert both.mask.tolist() == [[True, True, True, False, False]]
    assert torch.equal(both.context[0, 0], conditioner.ground)
    torch.testing.assert_close(both.context[0, 2], alone.context[0, 1])
    assert not torch.allclose(both.context[0, 1], both.context[0, 2])


@pytest.mark.parametrize("changed", [(1, *RED[1:]), (0, 0.1, 0, 0.5, 0.5), (0, 0, 0.1, 0.5, 0.5), (0, 0, 0, 0.5, 0.6)])
def test_class_and_each_coordinate_count(changed: tuple[float, ...]) -> None:
    conditioner = boxes()
    one, other = (conditioner({"boxes": [[box]]}).context[0, 1] for box in (RED, changed))
    assert (one - other).abs().max() > 0.01


def test_groundes_are_one_token_and_no_nan() -> None:
    """The same for an image without boxes, an absent list and a dropped one; attention to it is defined."""
    conditioner = boxes(dropout=0.999999)
    absent = conditioner({"boxes": [None, []]})
    dropped = conditioner({"boxes": [[RED], [BLUE]]}, torch.Generator().manual_seed(0))
    for cond in (absent, dropped, conditioner.unconditional({"boxes": [[RED], [BLUE]]})):
        assert cond.mask.tolist() == [[True, False, False, False, False]] * 2
        assert torch.equal(cond.context[:, 0], conditioner.ground.expand(2, 8))
    attended = Attention(8, 2, 8)(torch.randn(2, 5, 8), absent.context, absent.mask)
    assert attended.isfinite().all()


def test_the_boxes_of_each_example_are_dropped_by_themselves() -> None:
    kept = boxes(dropout=0.5)({"boxes": [[RED, BLUE]] * 100}, torch.Generator().manual_seed(0)).mask[:, 2]
    assert 25 < kept.sum() < 75


def test_gradients_reach_all_weights() -> None:
    conditioner = boxes()
    conditioner({"boxes": [[RED], []]}).context.square().sum().backward()
    assert all(parameter.grad is not None for parameter in conditioner.parameters())


def test_fourier_features_are_sines_and_cosines_of_rising_frequencies() -> None:
    x = torch.tensor([[0.3, 0.7]])
    features = fourier_features(x)
    assert features.shape == (1, 32)
    angles = torch.tensor([share * 100 ** (k / 8) for share in (0.3, 0.7) for k in range(8)])
    torch.testing.assert_close(features[0], torch.cat([angles.sin(), angles.cos()]))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([(3, 0, 0, 1, 1)], "image 1 has a box of class 3, but the classes are 0 to 2"),
        ([RED] * 5, r"image 1 has 5 boxes, but the model takes at most 4 \(max_boxes\)"),
        (
            [RED, (0, 0.5, 0, 0.4, 1)],
            r"the boxes of image 1 are not a list of \(class, x0, .* at number 1; correct them",
        ),
        ([(0, 0, 0, 1)], "are not a list"),
        ([(0, 0, 0, 16, 16)], "with 0 <= x0 < x1 <= 1"),
        ([(0.5, 0, 0, 1, 1)], "are not a list"),
        ([(-1, 0, 0, 1, 1)], "are not a list"),
        ([("red", 0, 0, 1, 1)], "are not a list"),
        (RED, "are not a list"),
    ],
)
def test_what_is_ground_is_one_sentence(layout: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        boxes()({"boxes": [[RED], layout]})


def test_data_without_boxes_is_refused() -> None:
    with pytest.raises(DataError, match=r"the data has none; give each sample a \.boxes\.json"):
        boxes()({"text": ["a"]})


@pytest.mark.parametrize("changes", [{"classes": 0}, {"max_boxes": 0}, {"width": 0}, {"dropout": 1.0}])
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        boxes(**changes)
