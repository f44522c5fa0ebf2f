from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.config import from_dict
from ldm.diffusion import Schedule
from ldm.diffusion.noise_level_samplers import Antithetic, LogNormal, Stratified, Uniform
from ldm.nn.batch_norm import BatchNorm
from ldm.nn.ranks import (
    BatchGenerator,
    draw_rows,
    gather_rows,
    gather_rows_with_gradients,
    mean_over_ranks,
    next_rows,
    rand_rows,
    randn_rows,
    sum_over_ranks,
)
from tests.processes import run_on_ranks

TOTAL = 12


def generator(start: int, total: int | None) -> BatchGenerator:
    made = BatchGenerator("cpu")
    made.manual_seed(5)
    made.start, made.total = start, total
    return made


def numbers(source: torch.Generator, n: int) -> list[Tensor]:
    """All that a step draws for a batch of ``n`` rows."""
    schedule = from_dict(Schedule, {"kind": "cosine"})
    samplers = (Uniform(), Antithetic(), Stratified(), LogNormal())
    levels = [draw_rows(lambda m, s=each: s.sample(m, schedule, source), n, source) for each in samplers]  # type: ignore[misc]
    return [rand_rows(n, source), randn_rows(torch.Size([n, 4, 3]), source), *levels, rand_rows(n, source)]


@pytest.mark.parametrize("parts", [[12], [6, 6], [3, 3, 3, 3], [1, 7, 4]])
def test_the_rows_of_all_ranks_are_those_of_one(parts: list[int]) -> None:
    starts = [sum(parts[:i]) for i in range(len(parts))]
    ranks = [numbers(generator(start, TOTAL), n) for start, n in zip(starts, parts, strict=True)]
    whole = numbers(torch.Generator("cpu").manual_seed(5), TOTAL)
    for found, expected in zip(zip(*ranks, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_one_process_gets_what_it_gives() -> None:
    x = torch.randn(3, 2)
    assert sum_over_ranks(x) is mean_over_ranks(x) is gather_rows(x) is x


def compare_rows() -> None:
    """Rows, and gradients averaged over the ranks, are those of one process with the batch of both."""
    rank, x = dist.get_rank(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole, own = x.clone().requires_grad_(), x.chunk(2)[rank].clone().requires_grad_()
    assert torch.equal(next_rows(own), x.roll(-1, 0).chunk(2)[rank])
    weight = torch.arange(24.0).view(6, 4)
    for rows in (whole, gather_rows_with_gradients(own)):
        assert torch.equal(rows, x)
        (rows.sin() * weight).sum().backward()
    torch.testing.assert_close(gather_rows(own.grad) / 2, whole.grad)  # each rank adds the same loss; their mean counts


def compare() -> None:
    """Values, gradients and running statistics of two steps are those of one process with the batch of both."""
    rank = dist.get_rank()
    x = 3 + torch.randn(2, 6, 4, 5, 5, generator=torch.Generator().manual_seed(0))  # two batches of six
    expected, found = nn.BatchNorm2d(4), BatchNorm(4)
    for batch in x:
        whole, own = batch.clone().requires_grad_(), batch.chunk(2)[rank].clone().requires_grad_()
        wanted, value = expected(whole), found(own)
        torch.testing.assert_close(gather_rows(value.detach()), wanted.detach())
        wanted.pow(3).mean().backward()
        value.pow(3).mean().backward()
        torch.testing.assert_close(gather_rows(own.grad) / 2, whole.grad, rtol=1e-4, atol=1e-7)
        for a, b in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mean_over_ranks(a.grad), b.grad, rtol=1e-4, atol=1e-6)
            a.grad = b.grad = None
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    torch.testing.assert_close(found.eval()(x[0]), expected.eval()(x[0]))


@pytest.mark.slow
def test_rows_of_all_ranks_with_their_gradients(tmp_path: Path) -> None:
    run_on_ranks(compare_rows, tmp_path)


@pytest.mark.slow
def test_batch_normalization_is_over_the_batches_of_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(compare, tmp_path)
