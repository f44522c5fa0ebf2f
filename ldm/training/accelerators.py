"""Peak throughput of devices, against which the operations of a training are measured."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

import torch

from ldm.devices import default_dtype
from ldm.errors import ConfigError, unknown

TFLOPS = 1e12

WORKSPACE, WORKSPACE_HOPPER = 2 * 4096 * 1024 + 8 * 16 * 1024, 32 * 1024 * 1024
"""Bytes that torch gives a handle of cuBLAS, and from compute capability 9 on (``CublasHandlePool.cpp``)."""


@dataclass(frozen=True)
class Accelerator:
    """Floating-point operations per second that a device reaches at most, as its manufacturer states them.

    Attributes:
        half: dense matrix products in bf16, or in fp16 if there is no bf16.
        fp32: operations in fp32, without TF32.
        bf16: whether the device computes in bf16 natively.
        workspace: bytes that torch gives a handle of cuBLAS on it.
    """

    half: float
    fp32: float
    bf16: bool = True
    workspace: int = WORKSPACE

    def peak(self, precision: str) -> float:
        """Return the peak in fp32, bf16 or fp16."""
        return self.fp32 if precision == "fp32" else self.half


ACCELERATORS = {
    "h200": Accelerator(989 * TFLOPS, 67 * TFLOPS, workspace=WORKSPACE_HOPPER),
    "h100": Accelerator(989 * TFLOPS, 67 * TFLOPS, workspace=WORKSPACE_HOPPER),
    "a100": Accelerator(312 * TFLOPS, 19.5 * TFLOPS),
    "l40s": Accelerator(362 * TFLOPS, 91.6 * TFLOPS),
    "4090": Accelerator(165 * TFLOPS, 82.6 * TFLOPS),
    "v100": Accelerator(125 * TFLOPS, 15.7 * TFLOPS, bf16=False),
    "t4": Accelerator(65 * TFLOPS, 8.1 * TFLOPS, bf16=False),
}
"""Devices by name; of H100 and H200 the SXM form."""


def accelerator(name: str) -> Accelerator:
    """Return the device of a name: one of :data:`ACCELERATORS`, or ``cpu``, this machine's, which is measured.

    Raises:
        ConfigError: the name is unknown.
    """
    name = name.lower()
    if name == "cpu":
        native = default_dtype(torch.device("cpu")) == torch.bfloat16
        fp32 = _measured(torch.float32)
        return Accelerator(_measured(torch.bfloat16) if native else fp32, fp32, native)
    if name not in ACCELERATORS:
        raise ConfigError(unknown("device", name, [*ACCELERATORS, "cpu"]))
    return ACCELERATORS[name]


def cublas_workspace(name: str | None = None) -> int:
    """Return the bytes of memory that torch gives each handle of cuBLAS.

    A handle belongs to a thread and a stream. The environment variable ``CUBLAS_WORKSPACE_CONFIG`` (``:4096:8``, which
    reproducible results need) replaces the default of the device.

    Args:
        name: a device of :data:`ACCELERATORS`; None: this machine's.
    """
    if chosen := re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return sum(1024 * int(size) * int(count) for size, count in chosen)
    if name is not None:
        return ACCELERATORS[name].workspace
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10, 12)
    return WORKSPACE_HOPPER if hopper else WORKSPACE


def this_machine() -> str | None:
    """Return the name of this machine's device in :func:`accelerator`; None if it is a GPU that is not listed."""
    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_name().lower().replace("-", " ").split()
    return next((name for name in ACCELERATORS if name in found), None)


def _measured(dtype: torch.dtype, size: int = 1024) -> float:
    """Return the operations per second of the fastest of a few matrix products on the CPU."""
    a = torch.ones(size, size, dtype=dtype, device="cpu")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
