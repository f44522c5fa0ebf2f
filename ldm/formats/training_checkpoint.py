"""Checkpoints of a stage's training, ``last.ckpt`` and ``best.ckpt``, read like the file that the finished stage leaves.

Beside what resuming needs, such a checkpoint has a record: the metadata of the native file of the stage, and the name of the
exported module in the state of the task. Checkpoints of earlier versions have none and can only be resumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import CheckpointError, some

RECORD, MODULE = "export", "module"
"""Key of the record in a checkpoint, and of the module's name in the record."""

MODEL_STAGE = "denoiser"
"""Folder of the stage whose checkpoints are complete models."""

ALWAYS = ("completed_steps", "state_dict", "loops")
"""Keys that every checkpoint of a training has had."""


def find_checkpoint(folder: Path, name: str) -> Path:
    """Return a checkpoint in the folder of a stage, or of stage 3 in a run folder; see :func:`checkpoint_in`.

    Raises:
        CheckpointError: there is none; the message names those that there are.
    """
    for place in (folder, folder / MODEL_STAGE):
        if (path := checkpoint_in(place, name)) is not None:
            return path
    there = checkpoints_in(folder)
    remedy = f"there are {some([str(path) for path in there])}" if there else "it holds no checkpoint of a training"
    raise CheckpointError(f"{folder} holds no checkpoint {name!r} of stage {MODEL_STAGE}; {remedy}.")


def checkpoint_in(folder: Path, name: str) -> Path | None:
    """Return a checkpoint in the folder of a stage; None if there is none.

    Args:
        folder: the folder.
        name: ``best``, ``last``, or the step of an earlier one, such as ``5000`` or ``step_5000``; also with ``.ckpt``.
    """
    name = str(name).removesuffix(".ckpt")
    if step := re.fullmatch(r"(?:step_)?(\d+)", name):
        return next((path for path in earlier_checkpoints(folder) if step_of(path) == int(step[1])), None)
    candidates = resume_points(folder) if name == "last" else [folder / f"{name}.ckpt"]
    return next((path for path in candidates if path.exists()), None)


def earlier_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints ``step_<number>.ckpt`` of a stage, which are older than ``last.ckpt``; the newest first."""
    return sorted(folder.glob("step_*[0-9].ckpt"), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the number in the name of an earlier checkpoint."""
    return int(path.stem.removeprefix("step_"))


def resume_points(folder: Path) -> list[Path]:
    """Return the checkpoints from which the training of a stage can be resumed, the newest first."""
    last = folder / "last.ckpt"
    return [last] * last.exists() + earlier_checkpoints(folder)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder of a stage, or the best and last ones in that of a run."""
    patterns = [f"{place}{name}.ckpt" for place in ("", "*/") for name in ("best", "last")] + ["step_*[0-9].ckpt"]
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def is_training_checkpoint(content: object) -> bool:
    """Return whether the content of a pickle is a checkpoint of a stage's training."""
    return isinstance(content, dict) and all(key in content for key in ALWAYS)


def training_note(provenance: Mapping[str, Any]) -> str:
    """Return a sentence for the step whose weights a checkpoint holds; empty if the provenance is not that of a checkpoint."""
    if "unfinished" not in provenance:
        return ""
    stage, steps, last = (provenance.get(name) for name in ("stage", "steps", "max_steps"))
    before = ", before the end of the training" if provenance["unfinished"] else ""
    return f"the weights are those after step {steps} of {last} of stage {stage}{before}"


def exported(content: Mapping[str, Any], path: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata that the native file of the stage would have.

    Statistics of latents are in a checkpoint of stage 1 not measured yet.

    Args:
        content: content of the checkpoint.
        path: where it is from, for error messages.
        ema: use the averaged weights, if there are any.

    Raises:
        CheckpointError: it has no record, or a broken one.
    """
    record, average = content.get(RECORD), content.get("ema", {})
    if record is None:
        raise CheckpointError(
            f"{path} was written by an earlier version of ldm, which recorded no config in it; resume the training to have it "
            "written again, or use the file of the finished stage."
        )
    average = average.get("average") if isinstance(average, dict) and ema else {}
    texts = isinstance(record, dict) and all(isinstance(text, str) for text in record.values())
    if not (texts and MODULE in record and isinstance(content["state_dict"], dict) and isinstance(average or {}, dict)):
        raise CheckpointError(
            f"{path} has a broken record of its config; resume the training to have it written again."
        )
    prefix = f"{record[MODULE]}."
    state = {name[len(prefix) :]: each for name, each in content["state_dict"].items() if str(name).startswith(prefix)}
    return state | (average or {}), record
