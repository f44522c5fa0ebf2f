"""Peak throughput of a machine, as its largest matrix products and convolutions reach it, and operations of a computation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldm.benchmarks.case import Setup


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of convolutions, and of matrix products and attention."""

    convolution: int
    matmul: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.convolution + self.matmul


@dataclass(frozen=True)
class Peaks:
    """Floating-point operations per second of large matrix products and convolutions."""

    matmul: float
    convolution: float

    def seconds(self, operations: Operations) -> float:
        """Return how long the operations take at these rates."""
        return operations.matmul / self.matmul + operations.convolution / self.convolution


def measure_peaks(setup: Setup, seconds: float = 1.0) -> Peaks:
    """Measure the best rates of a square matrix product and a 3 x 3 convolution (channels_last), within ``seconds`` each."""
    n, width = (256, 32) if setup.small else (8192, 640) if setup.device.type == "cuda" else (2048, 320)
    a, b = setup.randn(n, n), setup.randn(n, n, seed=1)
    x = setup.randn(2, width, 64, 64)
    kernel = setup.randn(width, width, 3, 3, seed=1)
    with torch.inference_mode():
        matmul = _best(lambda: a @ b, setup.device, seconds)
        convolution = _best(lambda: F.conv2d(x, kernel, padding=1), setup.device, seconds)
    return Peaks(2 * n**3 / matmul, 2 * x[:, 0].numel() * kernel.numel() / convolution)


def count_operations(work: Callable[[], object]) -> Operations:
    """Count the operations of a computation while it runs, by the formulas of ``torch.utils.flop_counter``."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    convolution = sum(count for operation, count in counts.items() if "conv" in operation)
    return Operations(convolution, sum(counts.values()) - convolution)


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the least seconds of a call."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
