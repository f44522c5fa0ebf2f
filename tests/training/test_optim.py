from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm.config import from_dict
from ldm.errors import ConfigError
from ldm.training.config import TrainConfig
from ldm.training.optim import adamw


def config(**changes: Any) -> TrainConfig:
    return from_dict(TrainConfig, {"max_steps": 100, "batch_size": 1, "learning_rate": 1e-3} | changes)


@given(
    st.integers(1, 500), st.integers(0, 600), st.sampled_from(["constant", "cosine", "linear"]), st.integers(0, 600)
)  # fmt: skip
def test_the_learning_rate_rises_then_never_rises_again(max_steps: int, warmup: int, decay: str, step: int) -> None:
    factor = config(max_steps=max_steps, warmup_steps=warmup, decay=decay).learning_rate_factor
    assert 0.0 <= factor(step) <= 1.0
    assert factor(step + 1) >= factor(step) if step + 1 < warmup else factor(step + 1) <= factor(step)


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_the_learning_rate_at_the_marks(decay: str) -> None:
    factor = config(max_steps=110, warmup_steps=10, decay=decay).learning_rate_factor
    assert factor(0) == pytest.approx(0.1)  # the first step moves too
    assert factor(9) == factor(10) == 1.0
    assert factor(60) == pytest.approx({"constant": 1.0, "cosine": 0.5, "linear": 0.5}[decay])
    assert factor(110) == pytest.approx(1.0 if decay == "constant" else 0.0)


def test_matrices_decay_and_the_rest_does_not() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    )
    scale = nn.ParameterList([nn.Parameter(torch.tensor(1.0))])
    optimizer = adamw([network, scale], config(weight_decay=0.3, betas=[0.5, 0.9]))
    decayed, others = optimizer.param_groups
    assert [group["weight_decay"] for group in (decayed, others)] == [0.3, 0.0]
    assert {id(p) for p in decayed["params"]} == {id(network[0].weight), id(network[2].weight)}
    wanted = [network[0].bias, network[1].weight, network[1].bias, network[2].bias, scale[0]]
    assert {id(p) for p in others["params"]} == {id(p) for p in wanted}
    assert all(group["betas"] == (0.5, 0.9) and group["lr"] == 1e-3 for group in optimizer.param_groups)


def test_a_state_in_another_memory_format_continues_the_training() -> None:
    """As that of a checkpoint whose parameters were contiguous or sharded; the fused kernel takes all in one order."""
    ends = []
    for continued in (False, True):
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = adamw([network], config())
        for step in range(2):
            if continued and step == 1:
                state = optimizer.state_dict()
                for each in state["state"].values():
                    each |= {name: value.contiguous() for name, value in each.items()}
                optimizer = adamw([network], config())
                optimizer.load_state_dict(state)
            network(torch.randn(2, 3, 5, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(network.weight.detach())
    assert torch.equal(*ends)


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
        ({"decay": "cosin"}, r"decay: unknown value 'cosin'; did you mean 'cosine'"),
    ],
)
def test_impossible_trainings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
