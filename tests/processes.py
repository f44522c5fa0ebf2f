"""Functions run on several ranks: processes that talk through gloo on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch


def run_on_ranks(function: Callable[[], None], folder: Path, world_size: int = 2) -> None:
    """Run ``function`` of a module, in a process group of ``world_size``; it fails here if it fails on a rank."""
    spawn(_run, (function, world_size, folder), world_size, folder)


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], count: int, folder: Path) -> None:
    """Start ``function(number, *arguments)`` in processes whose temporary files are in ``folder``, and wait for them.

    Processes that are killed or end by ``os._exit`` leave such files behind, such as those of wandb, which open_clip imports.
    """
    with patch.dict(os.environ, TMPDIR=str(folder)):
        torch.multiprocessing.spawn(function, arguments, nprocs=count)


def _run(rank: int, function: Callable[[], None], world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world_size)
    function()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way
