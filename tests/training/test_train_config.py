from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import from_dict
from ldm.errors import ConfigError
from ldm.training.config import TrainConfig

DECAYS = ["constant", "cosine", "linear", "wsd"]


def config(**changes: Any) -> TrainConfig:
    return from_dict(TrainConfig, {"max_steps": 100, "batch_size": 1, "learning_rate": 1e-3} | changes)


@given(
    st.integers(1, 500), st.integers(0, 600), st.sampled_from(DECAYS), st.integers(0, 600)
)  # fmt: skip
def test_the_learning_rate_rises_then_never_rises_again(max_steps: int, warmup: int, decay: str, step: int) -> None:
    factor = config(max_steps=max_steps, warmup_steps=warmup, decay=decay).learning_rate_factor
    assert 0.0 <= factor(step) <= 1.0
    assert factor(step + 1) >= factor(step) if step + 1 < warmup else factor(step + 1) <= factor(step)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_learning_rate_at_the_marks(decay: str) -> None:
    factor = config(max_steps=110, warmup_steps=10, decay=decay).learning_rate_factor
    assert factor(0) == pytest.approx(0.1)  # the first step moves too
    assert factor(9) == factor(10) == 1.0
    assert factor(60) == pytest.approx({"cosine": 0.5, "linear": 0.5}.get(decay, 1.0))
    assert factor(110) == pytest.approx(1.0 if decay == "constant" else 0.0)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("sqrt", 1 - 0.5**0.5), ("cosine", 0.5)])
def test_wsd_is_stable_then_decays(shape: str, middle: float) -> None:
    """f(s - T) of its shape over the last steps: the first of them, T, is the last at the peak."""
    factor = config(
        max_steps=110, warmup_steps=10, decay={"kind": "wsd", "share": 0.2, "shape": shape}
    ).learning_rate_factor
    assert [factor(step) for step in (4, 9, 50, 90)] == [0.5, 1.0, 1.0, 1.0]
    assert factor(91) < 1.0
    assert factor(100) == pytest.approx(middle)
    assert factor(110) == pytest.approx(0.0)


def test_a_longer_training_with_wsd_has_the_same_stable_phase() -> None:
    short, long = (config(max_steps=steps, warmup_steps=10, decay="wsd").learning_rate_factor for steps in (110, 210))
    assert [short(step) for step in range(90)] == [long(step) for step in range(90)]
    assert short(100) < long(100) == 1.0


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 1.0])
def test_the_stable_steps_are_those_at_the_peak(share: float) -> None:
    train = config(max_steps=110, warmup_steps=10, decay={"kind": "wsd", "share": share})
    factors = [train.learning_rate_factor(step) for step in range(110)]
    assert train.stable_steps == 1 + max(step for step, factor in enumerate(factors) if factor == 1.0)
    assert config(decay="cosine").stable_steps is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, not 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, not 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0 and finite"),
        ({"betas": (1.0, 0.9)}, "betas must be in"),
        ({"weight_decay": -0.1}, "weight_decay at least 0"),
        ({"gradient_clip": 0.0}, "gradient_clip above 0"),
        ({"ema_decay": 1.0}, r"ema_decay in \[0, 1\)"),
        ({"betas": [0.9]}, "betas: expected 2 values, found 1"),
        ({"decay": {"kind": "wsd", "share": 0}}, "share is 0.0; it must be above 0 and at most 1"),
        ({"decay": "cosin"}, r"decay: unknown kind 'cosin'; did you mean 'cosine'"),
    ],
)
def test_impossible_trainings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
