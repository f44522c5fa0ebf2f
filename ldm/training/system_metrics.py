"""Metrics of the machine: throughput, waiting for data, memory, and the use of the device's peak (MFU)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from ldm.data.buckets import Shape
from ldm.errors import first_line, warn
from ldm.processes import resident_bytes
from ldm.training.accelerators import accelerator, this_machine

SYSTEM = "system/"
"""Prefix of the columns that a resumed training does not reproduce, since they depend on the machine and the time."""

GIB = 2**30


class SystemMetrics:
    """Measurements over the steps since the last row, of the first rank.

    Columns: ``samples_per_second`` of all ranks; ``data_wait``, the share of the time in [0, 1] that waited for a batch;
    ``memory_gib``, on CUDA the largest amount that tensors have occupied at once, else the resident memory of the process;
    ``mfu``, the model FLOPs utilization in [0, 1] (Chowdhery et al. 2204.02311, appendix B), where the peak is known.

    Args:
        device: device of the first rank.
        precision: fp32, bf16 or fp16.
        samples_per_step: samples of an optimizer step, on all ranks.
        devices: number of ranks.
        count_flops: returns a function from the shape of images to the floating-point operations of forward and backward pass
            for one sample; it is called on a CUDA device of which the peak is known. If it fails, a warning says why, and there
            is no MFU.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        samples_per_step: int,
        devices: int,
        count_flops: Callable[[], Callable[[Shape], float]] | None = None,
    ):
        self.device = device
        self.samples_per_step = samples_per_step
        self.flops_of: Callable[[Shape], float] | None = None
        self.peak = math.inf  # operations per second of all devices
        name = this_machine() if device.type == "cuda" else None
        if name is not None and count_flops is not None:
            try:
                self.flops_of, self.peak = count_flops(), accelerator(name).peak(precision) * devices
            except Exception as error:  # a network that cannot be counted can still be trained
                warn(
                    f"the operations of a step cannot be counted ({first_line(error)}), so that {SYSTEM}mfu is not logged."
                )
        self.restart(0, 0.0)

    def restart(self, step: int, waited: float) -> None:
        """Begin a measurement at ``step``, without the time before it (validation, for example).

        Args:
            step: steps completed so far.
            waited: seconds for which the training has waited for data so far.
        """
        self.start, self.flops = (time.perf_counter(), step, waited), 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def add(self, samples: int, shape: Shape) -> None:
        """Count a batch of this number of samples, on all ranks, of images of height and width ``shape``."""
        if self.flops_of is not None:
            self.flops += samples * self.flops_of(shape)

    def row(self, step: int, waited: float) -> dict[str, float]:
        """Return the columns for the steps since the last call or restart, and begin the next measurement."""
        then, since, waited_then = self.start
        seconds = max(time.perf_counter() - then, 1e-9)
        rate = self.samples_per_step * (step - since) / seconds
        cuda = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) if cuda else resident_bytes()
        row = {"samples_per_second": rate, "data_wait": (waited - waited_then) / seconds, "memory_gib": memory / GIB}
        if self.flops_of is not None:
            row["mfu"] = self.flops / seconds / self.peak
        self.restart(step, waited)
        return {SYSTEM + name: value for name, value in row.items()}
