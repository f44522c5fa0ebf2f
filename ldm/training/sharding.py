"""Fully sharded data parallelism (FSDP2): each rank holds a part of each weight, of its average and of its optimizer state.

Zhao et al. 2023, arXiv 2304.11277, in torch's ``fully_shard``. Lightning's ``FSDPStrategy`` wraps the older FSDP and refuses
CPUs; its ``ModelParallelStrategy`` leaves the sharding to the module and runs on any device, and is the base here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ldm.nn.ranks import mean_over_ranks
from ldm.training.tasks import Task


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network: the outermost entries of its lists of modules that have modules of their own.

    They are the residual blocks, transformer blocks and levels, each of which is gathered when it is called.
    """
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (each for each in child if any(True for _ in each.children()))
        else:
            yield from blocks(child)


def shard(task: Task, mesh: Any) -> list[FSDPModule]:
    """Shard the networks of a task in place, block by block, over the ranks of a one-dimensional device mesh.

    Parameters outside of its networks, scalars, and those that the task declares ``unsharded`` remain whole on each rank.

    Returns:
        The sharded networks.
    """
    whole = {parameter for parameter in task.parameters() if parameter.ndim == 0} | set(task.unsharded)
    networks = []
    for network in task.networks:
        for block in blocks(network):
            fully_shard(block, mesh=mesh, ignored_params=whole)
        networks.append(fully_shard(network, mesh=mesh, ignored_params=whole))
    return networks


class FSDP2(ModelParallelStrategy):
    """Lightning strategy that shards the networks of a :class:`ldm.training.engine.StageModule` over all ranks.

    The gradients of whole parameters are averaged over the ranks after each backward pass, as those of sharded ones are by torch.
    """

    networks: list[FSDPModule]

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)
        self.networks = []
        self.synchronizes = True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, task: Task) -> None:
        """Shard the networks of a task; the module calls it in ``configure_model``."""
        self.networks = shard(task, self.device_mesh["data_parallel"])

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients within the block without averaging them over the ranks."""
        self._synchronize(False)
        try:
            yield
        finally:
            self._synchronize(True)

    def _synchronize(self, value: bool) -> None:
        self.synchronizes = value
        for network in self.networks:
            network.set_requires_gradient_sync(value)

    def post_backward(self, closure_loss: Tensor) -> None:
        if self.synchronizes:
            for parameter in self.model.parameters():  # type: ignore[union-attr]
                if parameter.grad is not None and parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.grad = mean_over_ranks(parameter.grad)
