"""Conversion of latent statistics for formats that store one scaling factor (and optionally one shift) instead."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats.checkpoint import Part

SCALE, SCALE_SDXL = 0.18215, 0.13025
"""Scaling factors of published models (SD and SDXL); some readers assume the first."""

SCALE_FACTOR = "scale_factor"
"""Name of the tensor with the scaling factor of the latents, if an LDM file has it."""


def scale_from(value: Any) -> float:
    """Return a scaling factor from a file; raise ValueError or TypeError if it is not a finite number above 0."""
    scale = float(value)
    if not 0 < scale < math.inf:
        raise ValueError(f"{scale} is not above 0 and finite")
    return scale


def has_statistics(part: Part) -> bool:
    """Return whether a part has statistics of its latents, as first stages have."""
    return "latent_std" in part.state


def with_scale(part: Part, scale: float, shift: float = 0.0) -> Part:
    """Set the statistics of a first stage to one scaling factor and shift: normalized = (z - shift) scale."""
    channels = part.config.latent_channels
    statistics = {"latent_mean": torch.full((channels,), shift), "latent_std": torch.full((channels,), 1 / scale)}
    return replace(part, state={**part.state, **statistics})


def scale_and_shift_of(part: Part) -> tuple[float, float] | None:
    """Return the scaling factor and shift of a first stage; None if its channels differ in either."""
    mean, std = part.state["latent_mean"], part.state["latent_std"]
    if not bool((std == std[0]).all() & (mean == mean[0]).all()):
        return None
    # The shortest decimal that gives this deviation again: 0.18215, not 0.18214999.
    candidates = (float(f"{1 / float(std[0]):.{digits}g}") for digits in range(1, 18))
    scale = next(k for k in candidates if bool(torch.tensor(1 / k, dtype=std.dtype) == std[0]))
    return scale, shortest(mean[0])


def folded(part: Part, scale: float = SCALE, shifts: bool = False) -> Part:
    """Return a first stage whose latents are normalized by one factor, with the same normalized latents.

    Unless that is so already, mean m and deviation s of each channel are folded into its weights: it then encodes to
    (z - m) / (s k) instead of z, with k = ``scale``, and decodes from that.

    Args:
        part: a first stage.
        scale: the scaling factor k of the result.
        shifts: whether the format also has a place for one shift of all channels.

    Raises:
        CheckpointError: the statistics cannot be folded into the weights of this kind of network.
    """
    uniform = scale_and_shift_of(part)
    if uniform is not None and uniform[1] == 0:
        return part
    mean, std = (part.state[name].double() for name in ("latent_mean", "latent_std"))
    state = part.kind.fold(part.config, part.state, mean, std * scale)
    if state is not None:
        return with_scale(replace(part, state=state), scale)
    if uniform is not None and shifts:
        return part
    raise CheckpointError(
        f"the latents of this {part.kind.name} have a mean per channel, which cannot be folded into its weights exactly and "
        f"the format has no place for (the decoder has no 1 x 1 convolution before it); write a native file."
    )


def shortest(value: Tensor) -> float:
    """Return the shortest decimal that equals this number in its precision."""
    candidates = (float(f"{float(value):.{digits}g}") for digits in range(1, 18))
    return next(each for each in candidates if bool(torch.tensor(each, dtype=value.dtype) == value))
