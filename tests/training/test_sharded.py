"""EMA and clipping under FSDP2: sharded parameters get the values that unsharded ones get."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldm.training.config import TrainConfig
from ldm.training.ema import EMA
from ldm.training.gradient_clipping import clip_gradients
from ldm.training.optimizers import OptimizerConfig
from ldm.training.optimizers.adamw import AdamWConfig
from ldm.training.optimizers.muon import MuonConfig
from ldm.training.sharded_tensors import full_tensor
from tests.processes import run_on_ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))  # 7 and 3 rows: uneven shards


def trained(model: nn.Module, ema: EMA, steps: int, config: OptimizerConfig) -> torch.Tensor:
    """Train with a small limit on the norm of the gradients, on the same batch on all ranks; return the last norm."""
    optimizer = config.build([model], TrainConfig(steps, 1, 0.1))
    batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        norm = clip_gradients(model.parameters(), 0.5)
        optimizer.step()
        ema.update()
    return norm


def compare(config: OptimizerConfig) -> None:
    plain, sharded = network(), network()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    averages = EMA(plain, 0.5), EMA(sharded, 0.5)
    norms = [trained(model, ema, 4, config) for model, ema in zip((plain, sharded), averages, strict=True)]
    assert norms[0] > 0.5, "the gradients were clipped"
    torch.testing.assert_close(norms[1], norms[0])

    def same(wanted: nn.Module, found: nn.Module) -> None:
        for (name, a), (_, b) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
            torch.testing.assert_close(full_tensor(b.detach()), a.detach(), msg=name)
            torch.testing.assert_close(full_tensor(b.grad), a.grad, msg=name)

    same(plain, sharded)
    own = [full_tensor(parameter.detach()).clone() for parameter in sharded.parameters()]
    with averages[0].applied(), averages[1].applied():
        same(plain, sharded)
        assert not torch.equal(full_tensor(next(sharded.parameters()).detach()), own[0])
    assert all(
        torch.equal(full_tensor(now.detach()), before) for now, before in zip(sharded.parameters(), own, strict=True)
    )

    state = averages[1].state_dict()
    whole = {name: full_tensor(tensor) for name, tensor in state["average"].items()}
    torch.testing.assert_close(whole, averages[0].state_dict()["average"])
    restored = EMA(sharded, 0.5)
    restored.load_state_dict(state | {"average": whole})
    for name, tensor in restored.average.items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.to_local(), averages[1].average[name].to_local())


def compare_optimizers() -> None:
    for config in (AdamWConfig(), MuonConfig()):
        compare(config)


@pytest.mark.slow
def test_sharded_weights_are_trained_averaged_and_clipped_like_unsharded_ones(tmp_path: Path) -> None:
    run_on_ranks(compare_optimizers, tmp_path)
