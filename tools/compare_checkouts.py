"""Compare the speed of two checkouts of this repository: import, sampling and training, measured alternately in one run.

    git worktree add ../before COMMIT
    tools/compare_checkouts.py ../before .

Each round runs every case in both checkouts, one after the other, in processes of their own; the median over the rounds is
printed, with the ratio before / after (above 1: the second checkout is faster).
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

from typer import Argument, Option

from ldm.cli.common import new_app, run
from ldm.errors import LdmError, unknown

STEPS = 20
"""Training steps per round."""

IMPORT = """
import time; start = time.perf_counter()
from ldm import Pipeline
print("measured", time.perf_counter() - start)
"""
SAMPLE = """
import time, torch
from ldm import Pipeline
pipe = Pipeline.from_pretrained("emoji", "cpu", torch.float32)
pipe("red apple", num_inference_steps=2, progress=False)
start = time.perf_counter()
pipe(["red apple", "unicorn"] * 2, seed=0, num_inference_steps=10, progress=False)
print("measured", time.perf_counter() - start)
"""

Measure = Callable[[Path, Path, int], float]
"""Maps a checkout, a folder for its runs and the number of the round to seconds."""

app = new_app()


@app.command()
def compare(
    before: Annotated[Path, Argument(help="Checkout to compare with.")],
    after: Annotated[Path, Argument(help="Checkout whose speed is in question.")] = Path(),
    case: Annotated[list[str] | None, Option(help="import, sample, vae, clip or denoiser; repeatable. All.")] = None,
    rounds: Annotated[int, Option(help="Measured rounds; one more is run first to warm up.")] = 5,
) -> None:
    """Print the median seconds of each case in both checkouts, and their ratio."""
    for name in case or []:
        if name not in CASES:
            raise LdmError(unknown("case", name, CASES))
    print(f"{'':12}{'before':>10}{'after':>10}{'before/after':>14}")
    with tempfile.TemporaryDirectory() as folder:
        for name in case or CASES:
            seconds: tuple[list[float], list[float]] = ([], [])
            for number in range(rounds + 1):
                for tree, side, values in zip((before, after), ("before", "after"), seconds, strict=True):
                    value = CASES[name](tree.resolve(), Path(folder) / side / name, number)
                    values += [value] if number else []
            old, new = (median(values) for values in seconds)
            print(f"{name:12}{old:9.3f}s{new:9.3f}s{old / new:14.3f}", flush=True)


def _script(code: str) -> Measure:
    """Measure what a script prints after the word "measured"."""

    def measure(tree: Path, runs: Path, number: int) -> float:
        output = _python(tree, "-c", code)
        return float(next(line for line in output.splitlines() if line.startswith("measured")).split()[1])

    return measure


def _training(stage: str) -> Measure:
    """Measure the seconds of ``STEPS`` steps of a stage of configs/emoji_64.yaml; each round continues the run."""

    def measure(tree: Path, runs: Path, number: int) -> float:
        train = {"max_steps": STEPS * (number + 1), "log_every": STEPS, "checkpoint_every": STEPS, "batch_size": 8}
        sources = ["vae.checkpoint=emoji", "clip.checkpoint=emoji"] if stage == "denoiser" else []
        overrides = [f"{stage}.train.{name}={value}" for name, value in train.items()]
        command = ["tools/train.py", "--stage", stage, "--config", "configs/emoji_64.yaml", f"run_dir={runs}"]
        _python(tree, *command, *overrides, *sources, "data.cache=none", "data.workers=0", "trainer.precision=fp32")
        with (runs / stage / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"] == str(train["max_steps"])]
        per_second = next(
            value for row in rows for name, value in row.items() if name.endswith("_per_second") and value
        )
        return STEPS * 8 / float(per_second)

    return measure


CASES: dict[str, Measure] = {
    "import": _script(IMPORT),
    "sample": _script(SAMPLE),
    **{stage: _training(stage) for stage in ("vae", "clip", "denoiser")},
}


def _python(tree: Path, *arguments: str) -> str:
    """Run Python in a checkout and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LdmError(f"{' '.join(arguments[:4])} failed in {tree}: {last}")
    return done.stdout


if __name__ == "__main__":
    run(app)
