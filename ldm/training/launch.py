"""Devices and machines of a training, as the config or the launcher (torchrun, SLURM) gives them, and the strategy for them."""

from __future__ import annotations

import os

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry

from ldm.errors import TrainingError, unknown
from ldm.training.config import TrainerConfig

OWN = ("auto", "ddp", "fsdp2")
"""Strategies that are made here; those of Lightning's registry are others."""


def launched() -> tuple[str, int, int] | None:
    """Return the launcher, its processes on this machine and its machines; None if the command was started by itself."""
    if TorchElasticEnvironment.detect():
        local, ranks = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return "torchrun", local, ranks // local
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return "srun", int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return None


def devices_and_nodes(config: TrainerConfig) -> tuple[int | str, int]:
    """Return the devices of each machine ("auto" = all GPUs) and the number of machines.

    Raises:
        TrainingError: the config has other numbers than the launcher.
    """
    found = launched()
    if found is None:
        return config.devices, 1 if config.num_nodes == "auto" else config.num_nodes
    launcher, *counts = found
    for name, count in zip(("devices", "num_nodes"), counts, strict=True):
        given = getattr(config, name)
        if given not in ("auto", count):
            what = "processes on this machine" if name == "devices" else "machines"
            raise TrainingError(
                f"trainer.{name} is {given}, but {launcher} has started {count} {what}; set it to auto, or start as many."
            )
    return counts[0], counts[1]


def strategy_of(config: TrainerConfig, leaves_out_parameters: bool) -> str | Strategy:
    """Return the strategy that a config names.

    Args:
        config: the config.
        leaves_out_parameters: see :attr:`ldm.training.tasks.task.Task.leaves_out_parameters`.

    Raises:
        TrainingError: there is no such strategy.
    """
    devices, nodes = devices_and_nodes(config)
    gpus = torch.cuda.device_count() if config.accelerator in ("auto", "gpu", "cuda") else 0
    several = nodes > 1 or (gpus if devices == "auto" else int(devices)) > 1
    if config.strategy == "ddp" or (config.strategy == "auto" and several):
        return DDPStrategy(find_unused_parameters=leaves_out_parameters)
    if config.strategy == "fsdp2":
        from ldm.training.sharding import FSDP2

        return FSDP2()
    if config.strategy not in (*OWN, *StrategyRegistry.available_strategies()):
        raise TrainingError(f"trainer.strategy: {unknown('strategy', config.strategy, OWN)}")
    return config.strategy
