"""Trains a stage straight and with ``kill -9`` at random moments, and compares all that the two leave.

    python tests/resume/kills.py --stage vae --workers 2 --kills 10
    python tests/resume/kills.py --stage vae --at 7+0.01 last.part*2

Compared are the weights, their average, the optimizers, the position in the data, ``metrics.csv`` and the TensorBoard events
(timings aside), the images, and the keys of the samples of each batch. A killed training is a process of its own; it is
forked from this one, since starting Python takes longer than the training.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[2]))

from ldm.data.shards import Sample, write_shard
from ldm.errors import LdmError
from ldm.training.handoff import result_file
from ldm.training.stages import train_stage
from ldm.training.system_metrics import SYSTEM
from tests.data.pictures import encoded, noise_picture
from tests.experiments import tiny_experiment
from tests.resume.logged import log_keys, read_keys

STEPS = 24
SAMPLES = 40
SCHEDULE = {
    "max_steps": STEPS,
    "log_every": 3,
    "validate_every": 4,
    "images_every": 6,
    "checkpoint_every": 5,
    "keep_checkpoints": 2,
}
"""Intervals without a common multiple, so that a kill may separate any two of them; an epoch has ten steps."""

PARTS = ("state_dict", "optimizer_states", "ema", "completed_steps", "interrupted", "samples_per_batch", "loops")
"""What two checkpoints have in common if their trainings have done the same."""


@dataclass
class Training:
    """A training of a stage in a folder of its own, in one or several sessions."""

    folder: Path
    stage: str
    overrides: Sequence[str]

    @property
    def keys(self) -> Path:
        return self.folder / "keys.txt"

    @property
    def stage_folder(self) -> Path:
        return self.folder / "run" / self.stage

    def restart(self) -> None:
        """Delete what the training has left, to begin again."""
        shutil.rmtree(self.stage_folder)
        result_file(tiny_experiment(self.folder), self.stage).unlink(missing_ok=True)
        self.keys.unlink()

    def start(self) -> int:
        """Fork a process that trains to the end; its output goes to ``log.txt``. Return its number."""
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            log_keys(self.keys)
            train_stage(tiny_experiment(self.folder, *self.overrides), self.stage)
            status = 0
        except LdmError as error:
            print(f"error: {error}", flush=True)
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def run(self, kill: Callable[[], bool] = lambda: False) -> int:
        """Train until the end, or until ``kill`` returns True; return the exit status, negative for a signal."""
        process = self.start()
        while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if kill():
                os.kill(process, signal.SIGKILL)
            time.sleep(0.0005)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    @property
    def log(self) -> str:
        """The end of the output."""
        return (self.folder / "log.txt").read_text()[-3000:]


# Moments, as texts


def random_moment(training: Training, generator: random.Random) -> str:
    """A moment while a file is written, within the rest of the training, or at its end."""
    kind = generator.random()
    if kind < 0.3:
        return f"{generator.choice(['last.part', 'best.part', 'metrics.part'])}*{generator.randint(1, 3)}"
    keys = read_keys(training.keys)
    batch = STEPS - 1 if kind < 0.4 else generator.randint(keys[-1][0] if keys else 0, STEPS - 1)
    return f"{batch}+{generator.uniform(0, 0.1):.3f}"


def condition(training: Training, moment: str) -> Callable[[], bool]:
    """Whether a moment of the next session has come.

    ``7+0.01`` is 0.01 seconds after batch 7, or a later one, has begun; ``last.part*2`` is while that file is written
    for the second time.
    """
    if "*" in moment:
        return _while_writing(training, *moment.split("*"))
    return _after_batch(training, *moment.split("+"))


def _after_batch(training: Training, batch: str, delay: str) -> Callable[[], bool]:
    before, began = len(read_keys(training.keys)), math.inf

    def due() -> bool:
        nonlocal began
        if began == math.inf and any(index >= int(batch) for index, _ in read_keys(training.keys)[before:]):
            began = time.perf_counter()
        return time.perf_counter() - began >= float(delay)

    return due


def _while_writing(training: Training, name: str, times: str) -> Callable[[], bool]:
    path, left = training.stage_folder / name, int(times)
    existed = path.exists()  # an earlier kill may have left it

    def due() -> bool:
        nonlocal left, existed
        exists = path.exists()
        left, existed = left - (exists and not existed), exists
        return left <= 0

    return due


# Comparison


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The places at which two trees of values differ; tensors must be equal to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{where}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [each for key in a.keys() & b.keys() for each in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [each for i, (x, y) in enumerate(zip(a, b, strict=True)) for each in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without timings; the names are in the order of the columns."""
    with path.open(newline="") as file:
        return [{name: row[name] for name in row if not name.startswith(SYSTEM)} for row in csv.DictReader(file)]


def events(folder: Path) -> dict[str, dict[int, float]]:
    """The TensorBoard scalars by name and step."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [name for name in board.Tags()["scalars"] if not name.startswith(SYSTEM)]
    return {name: {event.step: event.value for event in board.Scalars(name)} for name in names}


def left_by(training: Training) -> dict[str, Any]:
    """All that a finished training has left, without what depends on the machine."""
    folder = training.stage_folder
    checkpoints = {
        path.name: torch.load(path, map_location="cpu", weights_only=True) for path in sorted(folder.glob("*.ckpt"))
    }
    return {
        "result": load_file(result_file(tiny_experiment(training.folder), training.stage)),
        "checkpoints": {
            name: {part: found[part] for part in PARTS if part in found} | {"metrics": found["callbacks"]["Metrics"]}
            for name, found in checkpoints.items()
        },
        "metrics": rows(folder / "metrics.csv"),
        "columns": [list(row) for row in rows(folder / "metrics.csv")[:1]],
        "events": events(folder / "tensorboard"),
        "images": {path.name: path.read_bytes() for path in (folder / "images").glob("*")},
        "files": sorted(path.name for path in folder.iterdir() if path.suffix != ".txt"),
    }


def wrong_keys(straight: Training, killed: Training) -> list[str]:
    """Batches in which any session of the killed training read other samples than the straight one."""
    expected = dict(read_keys(straight.keys))
    assert sorted(expected) == list(range(len(expected)))
    found = read_keys(killed.keys)
    wrong = [f"batch {index}: {keys} for {expected.get(index)}" for index, keys in found if expected.get(index) != keys]
    missing = expected.keys() - {index for index, _ in found}
    return wrong + [f"batch {index} is missing" for index in sorted(missing)]


def compare(straight: Training, killed: Training) -> list[str]:
    """What differs between two finished trainings."""
    return differences(left_by(straight), left_by(killed)) + wrong_keys(straight, killed)


# Experiments


def prepare(folder: Path, stage: str, workers: int, source: str | None = None) -> tuple[Training, Training]:
    """A straight training, which is finished, and one of the same config to be killed; both in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if source is None:
        source = str(folder / "images.tar")
        samples = (Sample(f"{i:02d}", f"number {i}", encoded(noise_picture(i, 16, 16)), "png") for i in range(SAMPLES))
        write_shard(Path(source), samples)
    sections = [f"{stage}.train.{name}={value}" for name, value in SCHEDULE.items()]
    overrides = [*sections, f"data.train={source}", f"data.val={source}", f"data.workers={workers}"]
    trainings = [Training(folder / name, stage, overrides) for name in ("straight", "killed")]
    before = {"vae": (), "clip": (), "denoiser": ("vae", "clip")}[stage]
    for each in before:
        base = Training(folder / "base", each, [*overrides[-3:], "data.workers=0", f"{each}.train.max_steps=1"])
        base.folder.mkdir(exist_ok=True)
        assert base.run() == 0, base.log
    for training in trainings:
        training.folder.mkdir()
        for each in before:
            shutil.copytree(folder / "base" / "run" / each, training.folder / "run" / each)
    assert trainings[0].run() == 0, trainings[0].log
    return trainings[0], trainings[1]


def kill_and_compare(straight: Training, killed: Training, moments: Iterator[str]) -> list[str]:
    """Kill a training at each moment, and compare it once it has ended; it begins again if there are moments left then."""
    problems: list[str] = []
    while moment := next(moments, "the end"):
        status = killed.run(condition(killed, moment) if moment != "the end" else lambda: False)
        assert status in (0, -signal.SIGKILL), killed.log
        print(f"{'killed' if status else 'finished before'}: {moment}", flush=True)
        if status:
            continue
        problems += compare(straight, killed)
        if moment == "the end":
            break
        killed.restart()
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("vae", "clip", "denoiser"), default="vae")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    parser.add_argument("--kills", type=int, default=10, help="number of random moments")
    parser.add_argument("--at", nargs="*", help="these moments instead of random ones")
    parser.add_argument("--source", help="shards to train on, as data.train; by default 40 small images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--folder", type=Path, help="working folder, which is kept; by default a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a process with more threads cannot be forked
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        straight, killed = prepare(folder, arguments.stage, arguments.workers, arguments.source)
        generator = random.Random(arguments.seed)
        moments = arguments.at or (random_moment(killed, generator) for _ in range(arguments.kills))
        problems = kill_and_compare(straight, killed, iter(moments))
    print("\n".join(problems[:20]))
    print(
        f"{arguments.stage}, {arguments.workers} workers: {f'{len(problems)} differences' if problems else 'all equal'}"
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
