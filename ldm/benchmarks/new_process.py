"""Comparisons of what a new process does, such as imports: each round starts one process for each side."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ldm.benchmarks.case import Case, Setup, peer_package
from ldm.benchmarks.peaks import Peaks
from ldm.benchmarks.result import Result, Side
from ldm.errors import LdmError

BEGIN = """
import gc, os, re, time
from pathlib import Path
def _status(name):
    try: return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError: return 0
_before, _start = _status("VmRSS"), time.perf_counter()
"""
END = """
print("measured", time.perf_counter() - _start, _status("VmHWM") - _before, flush=True)
"""


class Program(NamedTuple):
    """Python code of one side: what is not measured, and what is."""

    preparation: str
    work: str


@dataclass(frozen=True)
class ProcessComparison(Case):
    """A case whose sides are programs, each started in every round.

    Attributes:
        programs: returns the programs of ours and of theirs.
        packages: packages of the other side.
        from_start: whether the time begins with the start of the process, so that the start of Python counts.
        difference: returns the difference between the results of both sides; None = they are not compared.
    """

    name: str
    title: str
    peer: str
    programs: Callable[[Setup], tuple[Program, Program]]
    packages: tuple[str, ...] = ("diffusers",)
    from_start: bool = False
    difference: Callable[[Setup], float] | None = None

    def measure(self, setup: Setup, peaks: Peaks | None) -> Result:
        for package in self.packages:
            peer_package(package)
        programs = self.programs(setup)
        if not setup.small:
            for program in programs:  # files are in the page cache, and bytecode is compiled
                self._timed(program)
        found: list[list[tuple[float, int]]] = [[], []]
        for number in range(setup.rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                found[side].append(self._timed(programs[side]))
        ours, theirs = (
            Side([seconds for seconds, _ in rounds], max(memory for _, memory in rounds) or None) for rounds in found
        )
        difference = self.difference(setup) if self.difference else None
        return Result(self.name, self.title, self.peer, ours, theirs, difference)

    def _timed(self, program: Program) -> tuple[float, int]:
        """Return seconds, and the increase of the peak memory in bytes, of a program in a new process."""
        begin = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", f"{program.preparation}\n{BEGIN}\n{program.work}\n{END}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            line = next((each for each in process.stdout if each.startswith("measured ")), None)
            elapsed = time.perf_counter() - begin
            _, errors = process.communicate()
        if line is None:
            last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise LdmError(f"a program of the case {self.name} failed ({last[0]}).")
        _, seconds, memory = line.split()
        return elapsed if self.from_start else float(seconds), int(memory)
