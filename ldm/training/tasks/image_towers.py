"""Image towers of CLIPs as frozen parts of the losses of other stages."""

from __future__ import annotations

import torch
from torch import nn

from ldm.errors import CheckpointError
from ldm.formats import native, read
from ldm.training.tasks.task import IMAGE_ENCODER


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
