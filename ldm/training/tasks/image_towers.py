"""Image towers of CLIPs as frozen parts of the losses of other stages.

Checkpoints hold their fingerprints and not their weights, whose file is needed to build the task again. Earlier versions stored
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.clip.timm_tower import PREFIX, TimmTower
from ldm.errors import CheckpointError
from ldm.formats import native, read
from ldm.formats.tensors import fingerprint
from ldm.training.tasks.task import IMAGE_ENCODER, Task

RECORD = "image_towers"
"""Key of the fingerprints in a checkpoint."""


def image_tower(source: str, field: str) -> nn.Module:
    """Build the image tower of a CLIP, with its weights, or without values under ``torch.device("meta")``.

    Args:
        source: file, folder or hub id.
        field: config field that names it, for the error messages.

    Raises:
        CheckpointError: the source cannot be read, or has no image tower.
    """
    try:
        part = read(source).part(IMAGE_ENCODER)
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from None
    tower: nn.Module = part.config.build(len(part.state["projection.weight"]))
    if not torch.empty(0).is_meta:
        native.load_strictly(tower, part.state, source, torch.float32)
    return tower


def teacher_of(source: str, field: str) -> nn.Module:
    """Build the network whose features a denoiser is compared with: an image tower as :func:`image_tower`, or one of timm.

    Args:
        source: source of an image tower, or ``timm:NAME`` or ``timm:NAME=FILE``.
        field: config field that names it, for the error messages.

    Raises:
        CheckpointError: the source cannot be read, or has no image tower.
    """
    if not source.startswith(PREFIX):
        return image_tower(source, field)
    try:
        return TimmTower(source)
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from None


def fingerprints(task: Task) -> dict[str, str]:
    """Return the fingerprint of each image tower of a task, by the config field that names its source."""
    return {field: fingerprint(tower.state_dict(), {}) for field, tower in task.image_towers.items()}


def recorded_fingerprints(task: Task, checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprints of the image towers that a checkpoint of the task was trained with; empty if there were none."""
    if RECORD in checkpoint:
        return dict(checkpoint[RECORD])
    states = {field: _within(prefix, checkpoint["state_dict"]) for field, prefix in _prefixes(task).items()}
    return {field: fingerprint(state, {}) for field, state in states.items() if state}


def without(task: Task, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a task without its image towers."""
    prefixes = tuple(_prefixes(task).values())
    return {name: each for name, each in state.items() if not name.startswith(prefixes)}


def added(task: Task, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint with the present image towers of the task."""
    towers = ((prefix, task.image_towers[field].state_dict()) for field, prefix in _prefixes(task).items())
    return {**state, **{f"{prefix}{name}": each for prefix, tower in towers for name, each in tower.items()}}


def _prefixes(task: Task) -> dict[str, str]:
    """Return the prefix of each image tower in the state of a task."""
    names = {module: name for name, module in task.named_modules()}
    return {field: f"{names[tower]}." for field, tower in task.image_towers.items()}


def _within(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
