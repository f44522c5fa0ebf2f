"""Trainings of the tiny experiment on several ranks, in processes that are set up as torchrun does."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.processes import spawn


def train(
    config: Path, stages: Sequence[str], overrides: Sequence[str], world_size: int = 1, killed_after: int | None = None
) -> Path:
    """Train stages on a number of ranks and return the run folder, with a record of each rank and stage (:func:`record`).

    Of overrides of one key, the last counts. With ``killed_after``, every process kills itself in the step after that many.
    """
    from ldm.training.experiment import load_config

    overrides = [*{each.partition("=")[0]: each for each in ("trainer.devices=auto", *overrides)}.values()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world_size, port, config, stages, overrides, killed_after)
    try:
        spawn(_train, arguments, world_size, config.parent)
    except torch.multiprocessing.ProcessExitedException as error:
        if killed_after is None or error.signal_name not in ("SIGKILL", "SIGABRT"):  # or of gloo, which lost its peer
            raise
    return load_config(config, overrides).folder


def record(folder: Path, stage: str, rank: int = 0) -> dict[str, Any]:
    """Return ``keys``, of the samples of each training batch, and ``rows``, the rows of metrics.csv unrounded, of a rank."""
    found: dict[str, Any] = json.loads((folder / f"{stage}.{rank}.json").read_text())
    return found


def _train(
    rank: int,
    world_size: int,
    port: int,
    config: Path,
    stages: Sequence[str],
    overrides: Sequence[str],
    killed_after: int | None,
) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        place |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in place.items()})

    from ldm.training.experiment import load_config  # Lightning reads the rank when it is imported
    from ldm.training.stages import train_stage

    experiment = load_config(config, overrides)
    for stage in stages:
        keys: list[list[str]] = []
        rows: list[dict[str, float]] = []
        _record(keys, rows)
        if killed_after is not None:
            _kill_after(killed_after)
        train_stage(experiment, stage)
        text = json.dumps({"keys": keys, "rows": rows})
        (experiment.folder / f"{stage}.{rank}.json").write_text(text)
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way


def _record(keys: list[list[str]], rows: list[dict[str, float]]) -> None:
    """Let streams and metrics of this process add to the lists what they yield and write."""
    from ldm.data.stream import TrainStream
    from ldm.training.callbacks.metrics import Metrics
    from ldm.training.system_metrics import SYSTEM

    iterate, write = TrainStream.__iter__, Metrics.write

    def recorded(self: TrainStream) -> Iterator[dict[str, Any]]:
        for batch in iterate(self):
            keys.append(list(batch["key"]))
            yield batch

    def recorded_row(self: Metrics, step: int, row: dict[str, float]) -> None:
        rows.append(
            {"step": step, **{name: float(value) for name, value in row.items() if not name.startswith(SYSTEM)}}
        )
        write(self, step, row)

    TrainStream.__iter__, Metrics.write = recorded, recorded_row  # type: ignore[method-assign]


def _kill_after(steps: int) -> None:
    """Let this process kill itself in the training step after that many, when it has computed the losses."""
    from ldm.training.engine import StageModule

    finite = StageModule._finite

    def killed(self: StageModule, *arguments: Any) -> float:
        if self.completed_steps == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return finite(self, *arguments)

    StageModule._finite = killed  # type: ignore[method-assign]
