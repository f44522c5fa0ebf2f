"""Peak throughput of devices, against which the operations of a training are measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ldm.devices import default_dtype
from ldm.errors import ConfigError, unknown

TFLOPS = 1e12


@dataclass(frozen=True)
class Accelerator:
    """Floating-point operations per second that a device reaches at most, as its manufacturer states them.

    Attributes:
        half: dense matrix products in bf16, or in fp16 if there is no bf16.
        fp32: operations in fp32, without TF32.
        bf16: whether the device computes in bf16 natively.
    """

    half: float
    fp32: float
    bf16: bool = True

    def peak(self, precision: str) -> float:
        """Return the peak in fp32, bf16 or fp16."""
        return self.fp32 if precision == "fp32" else self.half


ACCELERATORS = {
    "h200": Accelerator(989 * TFLOPS, 67 * TFLOPS),
    "h100": Accelerator(989 * TFLOPS, 67 * TFLOPS),
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
