"""Results of the stages that the denoiser was trained on, compared with those in the run folder now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diagnosis.opened_run import OpenedRun
from ldm.errors import LdmError
from ldm.formats.checkpoint import Checkpoint
from ldm.training.handoff import Handoff


class Predecessor(NamedTuple):
    """The result of an earlier stage.

    Attributes:
        source: its content.
        fingerprint: its fingerprint now.
        recorded: the fingerprint that the denoiser was trained on; None if it is unknown.
    """

    source: Checkpoint
    fingerprint: str
    recorded: str | None

    @property
    def is_another(self) -> bool:
        return self.recorded is not None and self.recorded != self.fingerprint


def predecessor(run: OpenedRun, stage: str) -> Predecessor | None:
    """Read the result of an earlier stage of the denoiser; None if it is missing or cannot be read."""
    if getattr(run.experiment, stage) is None:
        return None
    handoff = Handoff(run.experiment, "denoiser")
    try:
        source = handoff.predecessor(stage)
    except LdmError:
        return None
    return Predecessor(source, handoff.fingerprints[stage], run.stages["denoiser"].handoff.get(stage))


def differing(own: Mapping[str, Tensor], prefix: str, there: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights of a part of a model that are not those of the result of its stage."""
    own = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
    return [
        name
        for name, tensor in own.items()
        if name not in there
        or tensor.shape != there[name].shape
        or not torch.equal(tensor.float(), there[name].float())
    ]
