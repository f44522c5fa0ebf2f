from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli.cores import WAITING, WAITING_BY_USER, Usage, idle_cores, shorten_waiting, usage
from ldm.processes import THREADS_BY_USER

ROOT = Path(__file__).parents[2]
PRINT = "import os, torch; use_idle_cores(); print(torch.get_num_threads(), os.environ.get('GOMP_SPINCOUNT'))"


def in_a_command(busy: bool, **environment: str) -> list[str]:
    """Threads and spin count of a command on two cores, both of which another process keeps busy or neither does."""
    code = f"""
import os
os.sched_getaffinity = lambda _: {{0, 1}}
from ldm.cli import cores
from ldm.cli.cores import shorten_waiting, use_idle_cores
from ldm.processes import THREADS_BY_USER
shorten_waiting()
cores.START = cores.START._replace(all=cores.START.all - {1000 if busy else 0}, time=cores.START.time - 1000)
import torch; torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
{PRINT}
"""
    kept = {name: value for name, value in os.environ.items() if name not in (*WAITING_BY_USER, *THREADS_BY_USER)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [*done.stdout.split(), done.stderr]


def test_a_command_uses_the_idle_cores() -> None:
    assert in_a_command(busy=False) == ["2", WAITING["GOMP_SPINCOUNT"], ""]
    threads, _, message = in_a_command(busy=True)
    assert threads == "1"
    assert message.startswith("using 1 CPU thread, since other processes keep cores busy; OMP_NUM_THREADS sets")


def test_what_the_user_has_set_is_kept() -> None:
    assert in_a_command(busy=True, OMP_NUM_THREADS="2", GOMP_SPINCOUNT="7") == ["2", "7", ""]


@pytest.mark.parametrize("name", WAITING_BY_USER)
def test_no_waiting_is_set_beside_one_of_the_user(name: str) -> None:
    environment = {name: "1"}
    shorten_waiting(environment)
    assert environment == {name: "1"}


@pytest.mark.parametrize(("busy", "idle"), [(0.0, 0), (0.4, 0), (1.0, -1), (1.4, -1), (100.0, -100)])
def test_idle_cores_are_those_that_other_processes_leave(busy: float, idle: int) -> None:
    cores = len(os.sched_getaffinity(0))
    before = Usage(time=10.0, all=100.0, own=5.0)
    after = Usage(time=20.0, all=100.0 + 10 * busy + 8, own=5.0 + 8)
    assert idle_cores(before, after) == max(1, cores + idle)


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="only Linux has it")
def test_the_own_time_is_part_of_the_usage() -> None:
    before = usage()
    sum(range(10**7))
    after = usage()
    assert isinstance(before, Usage)
    assert isinstance(after, Usage)
    assert after.own > before.own
    assert after.all >= before.all
