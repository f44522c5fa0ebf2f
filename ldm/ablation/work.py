"""Work of the process of a run: training, then measuring."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ldm.ablation.metrics import measure
from ldm.ablation.runs import CONFIG, Record
from ldm.errors import DataError, DivergedError
from ldm.training.experiment import load_config
from ldm.training.stages import train_stage


def work(folder: Path) -> None:
    """Train the run of a folder, or go on with it, and measure its result; the record says how far it is.

    The checkpoints of a measured run are deleted; its result stays.

    Raises:
        DataError: there is no run in the folder.
        Interrupted: a signal stopped the training; the next call goes on.
    """
    record = Record.read(folder)
    if record is None:
        raise DataError(f"{folder} holds no run of a comparison; start it with tools/ablate.py.")
    task, experiment = record.task, load_config(folder / CONFIG)
    start, before = time.perf_counter(), record.seconds
    try:
        if record.state == "open":
            train_stage(experiment, task.stage)
            record = replace(record, state="trained")
        if record.state == "trained":
            numbers = measure(folder / CONFIG, task.stage, task.features, task.repeats, folder)
            record = replace(record, state="finished", numbers=numbers)
            for checkpoint in (folder / task.stage).glob("*.ckpt"):  # of several times the size of the result
                checkpoint.unlink()
    except DivergedError as error:
        record = replace(record, state="diverged", error=str(error))
    finally:
        replace(record, seconds=before + time.perf_counter() - start).write(folder)
