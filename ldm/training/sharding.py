"""Fully sharded data parallelism (FSDP2): each rank holds a part of each weight, of its average and of its optimizer state.

Zhao et al. 2023, arXiv 2304.11277, in torch's ``fully_shard``. Lightning's ``FSDPStrategy`` wraps the older FSDP and refuses
CPUs; its ``ModelParallelStrategy`` leaves the sharding to the module and runs on any device, and is the base here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ldm.formats.sharded_checkpoint import is_sharded, load_sharded, map_tensors, remove_checkpoint, save_sharded
from ldm.nn.ranks import mean_over_ranks
from ldm.training.checkpoint_io import not_written
from ldm.training.sharded_tensors import sharded_like
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

    Parameters outside of its networks, scalars, and those that the task declares ``unsharded`` remain unsharded.
    Nothing stays gathered after a forward pass, so that one without a backward pass never leaves a copy of weights that are
    replaced after it, such as by their average.

    Returns:
        The sharded networks.
    """
    ignored = {parameter for parameter in task.parameters() if parameter.ndim == 0} | set(task.unsharded)
    networks = []
    for network in task.called_modules:
        for block in blocks(network):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        networks.append(fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=ignored))
    return networks


class FSDP2(ModelParallelStrategy):
    """Lightning strategy that shards the networks of a :class:`ldm.training.engine.StageModule` over all ranks.

    The gradients of unsharded parameters are averaged over the ranks after each backward pass, as torch does for sharded ones.
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

    # Checkpoints: those of the other strategies, but with sharded tensors, in a folder

    lightning_restore_optimizer = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the parts of all ranks into a folder.

        Raises:
            TrainingError: a rank cannot write its part; nothing of it is left.
        """
        path, failure = Path(filepath), None
        if self.is_global_zero:
            remove_checkpoint(path)  # an unfinished one, of a process that was killed
        self.barrier()
        try:
            save_sharded(checkpoint, path)
        except Exception as error:  # of the file system, in consequence of which torch may raise any other
            failure = error
        if self.reduce_boolean_decision(failure is not None, all=False):
            if self.is_global_zero:
                remove_checkpoint(path)
            failure = failure or RuntimeError("the first process failed")
            raise not_written(checkpoint, path.parent, failure) from failure

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the parts of this rank of a sharded checkpoint, or of one that another strategy wrote as a file."""
        path = Path(checkpoint_path)
        if is_sharded(path):
            return load_sharded(path, self._like)

        def part(name: str, tensor: Tensor) -> Tensor:
            other = self._like(name, tensor.shape)
            return tensor if other is None else sharded_like(tensor, other)

        return map_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=True), part)

    def _like(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the parameter that is sharded like a tensor of a checkpoint; None if the tensor is not sharded."""
        module: Any = self.lightning_module
        section, *keys = name.split("/")
        found: Tensor | None = None
        if section == "state_dict":
            found = module.task.state_dict().get(keys[0])
        elif section == "ema" and keys[0] == "average":
            found = module.task.trainable_module.state_dict().get(keys[1])
        elif section == "power_averages" and keys[1] == "average":
            found = module.task.trainable_module.state_dict().get(keys[2])
        elif section == "optimizer_states":
            groups = self.optimizers[int(keys[0])].param_groups
            found = [each for group in groups for each in group["params"]][int(keys[2])]
        return found if isinstance(found, DTensor) and found.shape == shape else None

    def post_backward(self, closure_loss: Tensor) -> None:
        if self.synchronizes:
            for parameter in self.model.parameters():  # type: ignore[union-attr]
                if parameter.grad is not None and parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.grad = mean_over_ranks(parameter.grad)
