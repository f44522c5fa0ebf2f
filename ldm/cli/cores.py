"""Use of the CPU while other processes run.

torch divides each operation among threads that meet at a barrier. libgomp and LLVM's OpenMP let a thread that is first wait
there in a busy loop for milliseconds. Alone that is fastest; while another process runs, the waiting thread takes the core that
the other thread needs, and a step becomes 10 to 35 times slower. So the commands shorten the busy loop, and do not start
more threads than cores are idle.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

from ldm.processes import THREADS_BY_USER

WAITING = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Turns of libgomp's busy loop (about 0.2 ms in all), and milliseconds of that of LLVM and Intel, after which a thread sleeps."""

WAITING_BY_USER = ("OMP_WAIT_POLICY", *WAITING)
"""Environment variables by which users choose; nothing is changed if one is set, as for those of the number of threads."""


class Usage(NamedTuple):
    """Seconds of CPU time until ``time``, of all processes on the cores that this one may use, and of this one."""

    time: float
    all: float
    own: float


def shorten_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads sleep soon at barriers; without effect once torch is imported, since OpenMP reads the variables then."""
    if not any(name in environment for name in WAITING_BY_USER):
        environment.update(WAITING)


def usage() -> Usage | None:
    """Measure the CPU time until now; None where the system does not tell (it is Linux's /proc/stat)."""
    try:
        names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except (OSError, AttributeError):
        return None
    ticks = [[int(field) for field in row[1:9]] for row in rows if row and row[0] in names]
    busy = sum(sum(row) - row[3] - row[4] for row in ticks)  # without idle and iowait
    own = os.times()
    return Usage(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own.user + own.system)


def idle_cores(before: Usage, now: Usage) -> int:
    """Return the number of cores that other processes left idle, rounded; at least 1."""
    others = (now.all - before.all) - (now.own - before.own)
    return max(1, round(len(os.sched_getaffinity(0)) - others / max(now.time - before.time, 1e-9)))


def use_idle_cores() -> None:
    """Let torch use as many threads as cores were idle since the start of the command, unless the user chose a number.

    The number of threads affects results by rounding.
    """
    now = usage()
    if START is None or now is None or any(name in os.environ for name in THREADS_BY_USER):
        return
    import torch

    threads = idle_cores(START, now)
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)
        print(
            f"using {threads} CPU thread{'s' * (threads > 1)}, since other processes keep cores busy; OMP_NUM_THREADS sets "
            "another number",
            file=sys.stderr,
        )


START = usage()
"""Usage when the command was started."""
