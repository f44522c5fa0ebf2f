"""Measure the training steps of one stage alone and next to busy processes, with and without the measures of ldm/cli/cores.py.

    tools/contention.py --stage vae --rounds 3

Needs a machine that is otherwise idle. Alone, "with" should lose at most 3 % against "without"; next to one busy process, a step
"with" should take at most 2.5 times as long as alone.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

from tqdm import tqdm
from typer import Option

from ldm.cli.common import new_app, run
from ldm.errors import LdmError

ROOT = Path(__file__).resolve().parents[1]
BATCH = 8

TRAIN = "from ldm.cli.train import main; main()"
COMMANDS = {"without": f"import torch; from ldm.cli import cores; cores.START = None; {TRAIN}", "with": TRAIN}
"""Python code of each case; OpenMP reads its variables when torch is imported."""

app = new_app()


@app.command()
def contention(
    stage: Annotated[str, Option(help="vae, clip or denoiser of configs/emoji_64.yaml.")] = "vae",
    busy: Annotated[int, Option(min=0, help="Number of busy processes; with 0, steps are measured alone only.")] = 1,
    steps: Annotated[int, Option(help="Training steps per measurement, after as many to warm up.")] = 10,
    rounds: Annotated[int, Option(help="Measurements of each case; the median is printed.")] = 3,
) -> None:
    """Print the median seconds of a step in each case, and the ratio of neighbouring measurements alone."""
    cases = [(name, count) for name in COMMANDS for count in sorted({0, busy})]
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for name, count in tqdm(cases * rounds, unit="measurement", leave=False):
        seconds[name, count].append(step_seconds(COMMANDS[name], stage, count, steps))
    medians = {case: median(values) for case, values in seconds.items()}
    print(f"{'':10}{'alone':>10}{f'{busy} busy':>10}{'busy/alone':>14}")
    for name in COMMANDS:
        alone, contended = medians[name, 0], medians[name, busy]
        print(f"{name:10}{alone:9.3f}s{contended:9.3f}s{contended / alone:14.2f}")
    ratios = [ours / theirs for ours, theirs in zip(seconds["with", 0], seconds["without", 0], strict=True)]
    print(f"alone, with / without: median {median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


def step_seconds(code: str, stage: str, busy: int, steps: int) -> float:
    """Measure a training while ``busy`` processes run that never wait."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for _ in range(busy):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        train = {"max_steps": 10**6, "log_every": steps, "batch_size": BATCH, "warmup_steps": 10**6}
        overrides = [f"{stage}.train.{name}={value}" for name, value in train.items()]
        overrides += [f"run_dir={folder}", "trainer.accelerator=cpu", "trainer.precision=fp32"]
        overrides += ["data.cache=none", "data.workers=0", "data.cache_latents=false"]
        overrides += ["vae.checkpoint=emoji", "clip.checkpoint=emoji"] if stage == "denoiser" else []
        command = ["--stage", stage, "--config", str(ROOT / "configs" / "emoji_64.yaml"), *overrides]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        log = stack.enter_context((folder / "log").open("w+"))
        training = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", code, *command], env=environment, stdout=log, stderr=log)
        )
        stack.callback(training.kill)
        metrics = folder / stage / "metrics.csv"
        while len(speeds := _speeds(metrics)) < 2:
            if training.poll() is not None:
                raise LdmError(f"the training failed: {(folder / 'log').read_text().strip().splitlines()[-1]}")
            time.sleep(0.5)
    return BATCH / speeds[-1]


def _speeds(metrics: Path) -> list[float]:
    """Return the images per second of each row of metrics.csv."""
    if not metrics.is_file():
        return []
    with metrics.open(newline="") as file:
        return [
            float(row["system/samples_per_second"])
            for row in csv.DictReader(file)
            if row.get("system/samples_per_second")
        ]


if __name__ == "__main__":
    run(app)
