from __future__ import annotations

import torch
from torch import nn

from ldm.training.config import TrainConfig
from ldm.training.optimizers.adamw import AdamW, AdamWConfig


def adamw(modules: list[nn.Module], betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01) -> AdamW:
    return AdamWConfig().build(modules, TrainConfig(100, 1, 1e-3, betas=betas, weight_decay=weight_decay))


def test_matrices_decay_and_the_rest_does_not() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    )
    scale = nn.ParameterList([nn.Parameter(torch.tensor(1.0))])
    optimizer = adamw([network, scale], (0.5, 0.9), 0.3)
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
        optimizer = adamw([network])
        for step in range(2):
            if continued and step == 1:
                state = optimizer.state_dict()
                for each in state["state"].values():
                    each |= {name: value.contiguous() for name, value in each.items()}
                optimizer = adamw([network])
                optimizer.load_state_dict(state)
            network(torch.randn(2, 3, 5, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(network.weight.detach())
    assert torch.equal(*ends)
