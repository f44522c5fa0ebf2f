"""Share of each operator in the time of both sides of a comparison, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from ldm.benchmarks.case import SIDES, Setup
from ldm.benchmarks.compare import Comparison

SHOWN = 12
"""Number of operators of each side that are listed."""


def profiled(case: Comparison, setup: Setup) -> list[str]:
    """Return lines with the operators of a run of each side that take the most time, and the share of the other operators."""
    lines = []
    for side in SIDES:
        work = case.side(side, setup)
        work.run()
        times = _times(work.run, setup)
        total = sum(times.values())
        lines.append(f"{case.name}, {side}: {total:.2f} s")
        listed = sorted(times, key=lambda name: -times[name])[:SHOWN]
        rest = total - sum(times[name] for name in listed)
        lines += [f"  {name:48}{100 * times[name] / total:5.1f} %" for name in listed]
        lines.append(f"  {'other operators':48}{100 * rest / total:5.1f} %")
    return lines


def _times(run: Callable[[], object], setup: Setup) -> dict[str, float]:
    """Return seconds by operator, without those of the operators that it calls."""
    gpu = setup.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        run()
    return {
        event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
    }
