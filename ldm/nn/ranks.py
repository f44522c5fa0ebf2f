"""Computations over the batch of all ranks (processes) of a training: its random numbers, and sums over it.

With one process, each function returns what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class BatchGenerator(torch.Generator):
    """Random generator for the batch of all ranks, of which this rank computes some rows.

    All ranks create it with the same seed; :func:`draw_rows` returns the numbers of their rows.

    Attributes:
        start: first row of this rank.
        total: rows of all ranks; None = those that are drawn are all.
    """

    start: int = 0
    total: int | None = None


def draw_rows(draw: Callable[[int], Tensor], n: int, generator: torch.Generator) -> Tensor:
    """Return the random numbers ``[n ...]`` of a batch of ``n`` rows.

    With a :class:`BatchGenerator` they are those of the rows of this rank, so that they do not depend on how many ranks
    the batch is divided among.

    Args:
        draw: draws the numbers ``[m ...]`` of ``m`` rows from ``generator``.
        n: rows of the batch on this rank.
        generator: source of the numbers.
    """
    total = getattr(generator, "total", None)
    return draw(n) if total is None else draw(total).narrow(0, getattr(generator, "start", 0), n)


def randn_rows(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers of a batch ``[n ...]``, fp32, on the generator's device; see :func:`draw_rows`."""
    rest, device = shape[1:], generator.device
    return draw_rows(
        lambda n: torch.randn((n, *rest), generator=generator, dtype=torch.float32, device=device), shape[0], generator
    )


def rand_rows(n: int, generator: torch.Generator) -> Tensor:
    """Return uniform numbers in [0, 1) of a batch, ``[n]``, fp32, on the generator's device; see :func:`draw_rows`."""
    return draw_rows(
        lambda m: torch.rand(m, generator=generator, dtype=torch.float32, device=generator.device), n, generator
    )


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; to be called on each of them. Its gradient is the sum of their gradients."""
    summed: Tensor = x if world_size() == 1 else _Sum.apply(x)
    return summed


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks; see :func:`sum_over_ranks`."""
    return x if world_size() == 1 else sum_over_ranks(x) / world_size()


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows ``[n ...]`` of all ranks, in their order, ``[world_size n ...]``, without gradients."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def next_rows(x: Tensor) -> Tensor:
    """Return for each row ``[n ...]`` the next one in the batch of all ranks, for the last the first, without gradients."""
    rows = gather_rows(x.detach()).roll(-1, 0)
    return rows if world_size() == 1 else rows.narrow(0, dist.get_rank() * len(x), len(x))


def gather_rows_with_gradients(x: Tensor) -> Tensor:
    """Return the rows ``[n ...]`` of all ranks, ``[world_size n ...]``.

    A loss of them that each rank adds to its own has the gradient of one process, if gradients are averaged over the ranks.
    """
    if world_size() == 1:
        return x
    own = dist.get_rank()
    return sum_over_ranks(torch.cat([x if rank == own else torch.zeros_like(x) for rank in range(world_size())]))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed: Tensor = _Sum.apply(gradient)
        return summed
