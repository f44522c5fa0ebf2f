"""Processes of the runs: several at once, each with its part of the cores, and all stopped with this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.ablation.runs import Run
from ldm.processes import THREADS_BY_USER, interruptible

LOG = "log.txt"
"""File in the folder of a run with the output of its process."""

POLL = 0.5
"""Seconds between two looks at the processes."""

EX_TEMPFAIL = 75
"""Exit code of a training that was stopped by a signal."""


def threads_of(jobs: int) -> int:
    """Return the number of CPU threads of each of several processes: their part of the cores, or what the user has set."""
    given = [int(os.environ[name]) for name in THREADS_BY_USER if os.environ.get(name, "").isdigit()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return given[0] if given else max(1, cores // jobs)


def run_all(
    runs: Sequence[Run],
    command: Callable[[Path], list[str]],
    jobs: int,
    threads: int,
    finished: Callable[[Run, int], None],
) -> None:
    """Run a process for each run, some at once, in order.

    Args:
        runs: the runs.
        command: function of the folder of a run that returns the command line of its process.
        jobs: most processes at once.
        threads: CPU threads of each.
        finished: called with each run whose process has ended, and its exit code.

    Raises:
        Interrupted: a signal of the system was received; the processes have saved their steps and ended.
        KeyboardInterrupt: Ctrl-C was pressed; so have they.
    """
    waiting, active = list(runs), dict[int, tuple[Run, subprocess.Popen[bytes]]]()
    total = sum(each.task.steps for each in runs)
    bar = tqdm(total=total, unit="step", desc="training", leave=False, disable=not sys.stderr.isatty())
    done = 0
    with interruptible("the comparison"), bar:
        try:
            while waiting or active:
                for slot in range(jobs):
                    if waiting and slot not in active:
                        run = waiting.pop(0)
                        active[slot] = run, _start(run, command(run.folder), threads, slot)
                for slot, (run, process) in list(active.items()):
                    code = process.poll()
                    if code is not None:
                        del active[slot]
                        done += run.task.steps
                        finished(run, code)
                bar.n = done + sum(steps_of(run) for run, _ in active.values())
                bar.set_postfix_str("; ".join(run.name for run, _ in active.values()))
                time.sleep(POLL)
        finally:
            _stop([process for _, process in active.values()])


def steps_of(run: Run) -> int:
    """Return the number of steps of a run that its metrics show."""
    try:
        last = (run.folder / run.task.stage / "metrics.csv").read_text(encoding="utf-8").splitlines()[-1]
        return min(int(last.partition(",")[0]), run.task.steps)
    except (OSError, IndexError, ValueError):
        return 0


def _start(run: Run, command: list[str], threads: int, slot: int) -> subprocess.Popen[bytes]:
    run.prepare()
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **dict.fromkeys(THREADS_BY_USER, str(threads)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    if (count := torch.cuda.device_count()) > 1 and run.experiment.trainer.accelerator != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == count else [str(i) for i in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = names[slot % count]
    with (run.folder / LOG).open("ab") as log:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which stops the others.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let processes save their steps and end; a second Ctrl-C ends them at once."""
    try:
        for each in processes:
            each.send_signal(signal.SIGTERM)
        for each in processes:
            each.wait()
    finally:
        for each in processes:
            if each.poll() is None:
                each.kill()


def stop_with_parent() -> None:
    """Send this process SIGTERM when the process that started it has ended without stopping it, such as by a kill."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
