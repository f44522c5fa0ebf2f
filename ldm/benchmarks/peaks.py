"""Peak throughput of a machine, as its largest matrix products and convolutions reach it, and operations of a computation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
    """Measure the best rates of a square matrix product and of 3 x 3 convolutions (channels_last), each within ``seconds``."""
    gpu = setup.device.type == "cuda"
    n = 256 if setup.small else 8192 if gpu else 2048
    shapes = ((32, 16),) if setup.small else ((640, 128), (512, 256)) if gpu else ((320, 64), (256, 128))
    a, b = setup.randn(n, n), setup.randn(n, n, seed=1)
    rates = []
    with torch.inference_mode():
        matmul = _best(lambda: a @ b, setup.device, seconds)
        for width, side in shapes:
            x, kernel = setup.randn(2, width, side, side), setup.randn(width, width, 3, 3, seed=1)
            time_of_one = _best(lambda x=x, kernel=kernel: F.conv2d(x, kernel, padding=1), setup.device, seconds)  # type: ignore[misc]
            rates.append(2 * x[:, 0].numel() * kernel.numel() / time_of_one)
    return Peaks(2 * n**3 / matmul, max(rates))


def count_operations(work: Callable[[], object]) -> Operations:
    """Count the operations of a computation while it runs, by the formulas of ``torch.utils.flop_counter``."""
    with _Counter() as counter:
        work()
    return Operations(counter.convolution, counter.matmul)


class _Counter(TorchDispatchMode):
    """Counter as ``FlopCounterMode``, whose hooks of modules do not allow ``torch.autograd.grad`` within the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = self.matmul = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, formula = kwargs or {}, flop_registry.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # composite operators, which reach a mode under inference mode
                out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if formula is not None:
            count = formula(*args, **kwargs, out_val=out)
            if "conv" in str(func):
                self.convolution += count
            else:
                self.matmul += count
        return out


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
