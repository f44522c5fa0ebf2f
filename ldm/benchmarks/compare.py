"""Comparisons within one process: both sides are built with the same weights and measured in turn."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.benchmarks.case import SIDES, Case, Setup, Work, peer_package
from ldm.benchmarks.memory import peak_memory
from ldm.benchmarks.peaks import Operations, Peaks, count_operations, synchronize
from ldm.benchmarks.result import Result, Side

LEAST_SECONDS = 0.2
"""Shorter work is repeated within a round, up to this time."""

WARM_SECONDS = 20.0
"""Work that takes longer on both sides together is run once before it is measured, shorter work twice."""


@dataclass(frozen=True)
class Comparison(Case):
    """A case whose sides are computed in one process.

    Attributes:
        ours: builds our side.
        theirs: builds the other side with our weights.
        packages: packages of the other side.
    """

    name: str
    title: str
    peer: str
    ours: Callable[[Setup], Work]
    theirs: Callable[[Setup, Work], Work]
    packages: tuple[str, ...] = ("diffusers",)

    def side(self, side: str, setup: Setup) -> Work:
        """Build one side; what the other side needed is freed."""
        self._check_packages()
        ours = self.ours(setup)
        if side == SIDES[0]:
            return ours
        theirs = self.theirs(setup, ours)
        del ours
        gc.collect()
        return theirs

    def measure(self, setup: Setup, peaks: Peaks | None) -> Result:
        self._check_packages()
        ours = self.ours(setup)
        theirs = self.theirs(setup, ours)
        start = time.perf_counter()
        output, operations = _first_run(ours, setup.compile is not None or ours.compiled)
        their_output, their_operations = _first_run(theirs, setup.compile_peer or theirs.compiled)
        seconds = alternate(ours.run, theirs.run, setup, warm=time.perf_counter() - start > WARM_SECONDS)
        parts = []
        for title in ours.parts.keys() & theirs.parts.keys():
            times = alternate(ours.parts[title], theirs.parts[title], setup)
            parts.append(Result(self.name, title, self.peer, Side(times[0]), Side(times[1])))
        parameters = tuple(_parameters(work.network) for work in (ours, theirs) if work.network is not None)
        difference = _difference(output, their_output)
        del ours, theirs, output, their_output
        gc.collect()
        memory = [peak_memory(self.name, side, setup) if setup.memory else None for side in SIDES]
        counted = (operations or their_operations, their_operations)
        sides = [
            Side(times, used, _share(peaks, each, times))
            for times, used, each in zip(seconds, memory, counted, strict=True)
        ]
        both = (parameters[0], parameters[1]) if len(parameters) == 2 else None
        return Result(self.name, self.title, self.peer, sides[0], sides[1], difference, both, tuple(parts))

    def _check_packages(self) -> None:
        for package in self.packages:
            peer_package(package)


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], setup: Setup, warm: bool = False
) -> tuple[list[float], list[float]]:
    """Return the seconds of ``setup.rounds`` rounds of each side, which take turns, so that drift affects both equally.

    Unless they are ``warm``, both run once before. The order within a round alternates.
    """
    longest = LEAST_SECONDS if warm else max(_timed(work, setup, 1) for work in (ours, theirs))
    repeats = 1 if setup.small else max(1, math.ceil(LEAST_SECONDS / longest))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(setup.rounds):
        sides = [*zip((ours, theirs), times, strict=True)]
        for work, seconds in sides if number % 2 == 0 else reversed(sides):
            seconds.append(_timed(work, setup, repeats))
    return times


def _timed(work: Callable[[], object], setup: Setup, repeats: int) -> float:
    synchronize(setup.device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(setup.device)
    return (time.perf_counter() - start) / repeats


def _first_run(work: Work, compiled: bool) -> tuple[Tensor | None, Operations | None]:
    """Run a side for the first time; return its output and, if it is not compiled, its operations."""
    if compiled:
        return work.run(), None
    outputs: list[Tensor | None] = []
    operations = count_operations(lambda: outputs.append(work.run()))
    return outputs[0], operations


def _share(peaks: Peaks | None, operations: Operations | None, seconds: list[float]) -> float | None:
    if peaks is None or operations is None or operations.total == 0:
        return None
    return peaks.seconds(operations) / sorted(seconds)[len(seconds) // 2]


def _difference(ours: Tensor | None, theirs: Tensor | None) -> float | None:
    if ours is None or theirs is None:
        return None
    assert ours.shape == theirs.shape, f"ours has the shape {list(ours.shape)}, theirs {list(theirs.shape)}"
    a, b = ours.detach().double(), theirs.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def inference(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the call within ``torch.inference_mode``."""

    def run() -> Tensor:
        with torch.inference_mode():
            return call()

    return run
