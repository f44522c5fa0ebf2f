from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.errors import ConfigError
from ldm.training.config import TrainConfig
from ldm.training.costs import step_cost
from ldm.training.optimizers.adamw_8bit import AdamW8bitConfig
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment

TRAIN = TrainConfig(100, 1, 1e-3)
installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_bitsandbytes_is_one_sentence_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"adamw_8bit, but bitsandbytes is not installed; pip install 'ldm\[adam8bit\]'"
    ):
        train_stage(tiny_experiment(tmp_path, "clip.train.optimizer=adamw_8bit"), "clip")


def test_the_estimate_of_its_memory_is_a_quarter(tmp_path: Path) -> None:
    """Without bitsandbytes; plus a scale for each 256 values, and the moments of small parameters in fp32."""
    costs = [
        step_cost(tiny_experiment(tmp_path, "vae.model.widths=[64,64]", f"vae.train.optimizer={kind}"), "vae")
        for kind in ("adamw", "adamw_8bit")
    ]
    assert 0.25 < costs[1].optimizer / costs[0].optimizer < 0.3


@installed
def test_it_follows_adamw_and_resumes_bitwise() -> None:
    """Within the error of the 8 bits; parameters stay in channels_last."""
    ends = []
    for kind in ("adamw", "adamw_8bit", "resumed"):
        torch.manual_seed(0)
        network = nn.Conv2d(32, 32, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        begin = network.weight.detach().clone()
        config = TrainConfig(1, 1, 1e-3).optimizer if kind == "adamw" else AdamW8bitConfig()
        optimizer = config.build([network], TRAIN)
        for step in range(4):
            if kind == "resumed" and step == 2:
                state = optimizer.state_dict()
                optimizer = config.build([network], TRAIN)
                optimizer.load_state_dict(state)
            network(torch.randn(2, 32, 5, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert network.weight.is_contiguous(memory_format=torch.channels_last)
        ends.append(network.weight.detach() - begin)
    assert torch.equal(ends[1], ends[2])
    assert 0 < (ends[1] - ends[0]).norm() < 0.1 * ends[0].norm()


@pytest.mark.slow
@installed
def test_a_training_with_it_resumes_bitwise(tmp_path: Path) -> None:
    def trained(folder: str, *ends: int) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir()
        for end in ends:
            overrides = ["clip.train.optimizer=adamw_8bit", f"clip.train.max_steps={end}"]
            result = train_stage(tiny_experiment(tmp_path / folder, *overrides), "clip")
        return load_file(result)

    resumed, expected = trained("resumed", 2, 4), trained("at_once", 4)
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []
