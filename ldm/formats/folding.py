"""The statistics of the latents, for readers that know one scale alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from ldm.formats.checkpoint import Part

SCALE, SCALE_SDXL = 0.18215, 0.13025
"""The factors of published models; the first is what some readers take for granted."""


def scale_from(value: Any) -> float:
    """What a file gives as the scale of the latents; a ValueError or TypeError if it is not one number above 0."""
    scale = float(value)
    if not 0 < scale < math.inf:
        raise ValueError(f"{scale} is not above 0 and finite")
    return scale


def with_scale(part: Part, scale: float) -> Part:
    """An autoencoder with the one factor that normalises its latents."""
    channels = part.config.latent_channels
    statistics = {"latent_mean": torch.zeros(channels), "latent_std": torch.full((channels,), 1 / scale)}
    return replace(part, state={**part.state, **statistics})


def scale_of(part: Part) -> float | None:
    """The one factor that normalises the latents of an autoencoder; None if it is not one factor."""
    mean, std = part.state["latent_mean"], part.state["latent_std"]
    if mean.any() or not bool((std == std[0]).all()):
        return None
    # The shortest decimal that comes back as this deviation: 0.18215, not 0.18214999.
    candidates = (float(f"{1 / float(std[0]):.{digits}g}") for digits in range(1, 18))
    return next(k for k in candidates if bool(torch.tensor(1 / k, dtype=std.dtype) == std[0]))


def folded(part: Part, scale: float = SCALE) -> Part:
    """An autoencoder whose latents one factor normalises: mean m and deviation s of each channel go into its 1 x 1 convolutions.

    The encoder's is to give (z - m) / (s k) in place of z, with k = ``scale``, and the decoder's takes that: of the mean,
    bias first less m, then rows divided by s k; of the log-variance, bias less 2 ln(s k); back, W diag(s k) and b + W m.
    """
    if scale_of(part) is not None:
        return part
    mean, std = (part.state[name].double() for name in ("latent_mean", "latent_std"))
    factor = std * scale
    state = dict(part.state)
    weight, bias = (part.state[f"quant_conv.{name}"].double() for name in ("weight", "bias"))
    (weight_mean, weight_var), (bias_mean, bias_var) = weight.chunk(2), bias.chunk(2)
    state["quant_conv.weight"] = torch.cat([weight_mean / factor[:, None, None, None], weight_var])
    state["quant_conv.bias"] = torch.cat([(bias_mean - mean) / factor, bias_var - 2 * factor.log()])
    weight, bias = (part.state[f"post_quant_conv.{name}"].double() for name in ("weight", "bias"))
    state["post_quant_conv.weight"] = weight * factor[:, None, None]
    state["post_quant_conv.bias"] = bias + weight[:, :, 0, 0] @ mean
    for name in ("quant_conv", "post_quant_conv"):
        for each in (f"{name}.weight", f"{name}.bias"):
            state[each] = state[each].to(part.state[each].dtype)
    return with_scale(replace(part, state=state), scale)
