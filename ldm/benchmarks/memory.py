"""Peak memory of one side of a comparison, measured in a new process that runs nothing else."""

from __future__ import annotations

import gc
import pickle
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from ldm.benchmarks.case import Setup, all_cases
from ldm.errors import LdmError, first_line

RUNS = 2
"""Number of times that the work is done: the moments of an optimizer exist after the first time."""

MARK = "peak memory:"


def peak_memory(case: str, side: str, setup: Setup) -> int | None:
    """Return the bytes that one side of a :class:`ldm.benchmarks.compare.Comparison` occupies at most.

    On CUDA, of tensors on the device; else physical memory, above what the process occupies after the same work on tiny shapes,
    so that imported packages do not count. None where the system does not report it (it is Linux's ``VmHWM``).

    Raises:
        LdmError: the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from ldm.benchmarks.memory import main; main()", case, side],
        input=pickle.dumps(setup),
        capture_output=True,
        check=False,
    )
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith(MARK)]
    if not lines:
        reason = (done.stderr.decode().strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise LdmError(f"the peak memory of {side} in {case} could not be measured ({reason}); use --no-memory.")
    value = lines[-1].removeprefix(MARK).strip()
    return None if value == "None" else int(value)


def main() -> None:
    """Measure in this process: arguments are case and side, standard input is the pickled setup."""
    from dataclasses import replace

    from ldm.benchmarks.compare import Comparison

    name, side = sys.argv[1:]
    setup: Setup = pickle.loads(sys.stdin.buffer.read())
    case = all_cases()[name]
    assert isinstance(case, Comparison)
    try:
        case.side(side, replace(setup, small=True)).run()
        gc.collect()
        before = _reset_peak(setup.device)
        work = case.side(side, setup)
        for _ in range(RUNS):
            work.run()
    except LdmError as error:
        print(first_line(error), file=sys.stderr)
        sys.exit(2)
    after = _peak(setup.device)
    print(MARK, None if before is None or after is None else after - before)


def _reset_peak(device: torch.device) -> int | None:
    """Let the peak memory begin at what is used now, and return that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int | None:
    """Return the peak memory in bytes; None where the system does not report it (it is Linux's ``VmHWM``)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if peak is None else int(peak[1]) * 1024
