"""Low-rank updates of linear layers and convolutions (LoRA, Hu et al. 2021, arXiv 2106.09685): W' = W + s (alpha / r) B A.

An update is live, added to what its layer gives, or merged, part of the layer's weight. Merged weights are always made from
the original ones, which are kept, so that what several updates leave behind does not depend on what was loaded when.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.errors import SamplingError, unknown


@dataclass(frozen=True)
class LoRAWeights:
    """The update of one layer at scale 1.

    Attributes:
        down: A, ``[r in]``, or ``[r in k k]`` of a convolution with such a kernel.
        up: B, ``[out r]``.
        alpha: the update is alpha / r times B A.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def factor(self) -> float:
        return self.alpha / self.down.shape[0]

    def delta(self, like: Tensor) -> Tensor:
        """What it adds to a weight: of its shape, on the device and in the dtype of ``like``."""
        down, up = self.down.to(like), self.up.to(like)
        return (self.factor * (up @ down.flatten(1))).unflatten(1, down.shape[1:])


@dataclass
class Lora:
    """What one file does to a model.

    Attributes:
        name: by which it is scaled and unloaded.
        updates: by the names of the layers in the model.
        fingerprint: of the file's contents.
        scale: s; 0 is the model without it.
        merged: whether it is part of the weights, else it is live.
        handles: of the hooks of a live one.
    """

    name: str
    updates: Mapping[str, LoRAWeights]
    fingerprint: str
    scale: float = 1.0
    merged: bool = False
    handles: list[RemovableHandle] = field(default_factory=list)


class Live:
    """The forward hook of a layer that adds an update to its output."""

    def __init__(self, lora: Lora, update: LoRAWeights):
        self.lora, self.update = lora, update
        self.down, self.up = update.down, update.up

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0]
        if (self.down.device, self.down.dtype) != (x.device, x.dtype):
            with torch.inference_mode(False):  # kept beyond this sampling
                self.down, self.up = self.update.down.to(x), self.update.up.to(x)
        scale = self.lora.scale * self.update.factor
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            h = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
            return output + F.conv2d(scale * h, self.up[:, :, None, None])
        return output + F.linear(scale * F.linear(x, self.down), self.up)


class Loras:
    """The LoRAs of one model, which is handed to each method; any number stack, live and merged ones mixed.

    ``originals`` are the weights of merged layers as they are without any, on the CPU.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Lora] = {}
        self.originals: dict[str, Tensor] = {}

    def add(self, model: nn.Module, lora: Lora) -> str:
        """Let a LoRA take effect, and return its name.

        Raises:
            SamplingError: its name is taken, or its scale is no finite number.
        """
        if lora.name in self.loaded:
            raise SamplingError(f"a LoRA {lora.name!r} is loaded; unload it, or give this one another name.")
        lora.scale = _checked(lora.scale)
        self.loaded[lora.name] = lora
        if lora.merged:
            self._write(model, lora)
        else:
            lora.handles = [
                model.get_submodule(layer).register_forward_hook(Live(lora, update))
                for layer, update in lora.updates.items()
            ]
        return lora.name

    def set_scale(self, model: nn.Module, name: str, scale: float) -> None:
        """Change the scale of one.

        Raises:
            SamplingError: there is none of this name, or the scale is no finite number.
        """
        lora = self._one(name)
        lora.scale = _checked(scale)
        if lora.merged:
            self._write(model, lora)

    def remove(self, model: nn.Module, name: str | None = None) -> None:
        """Take one away, or all of them; without merged ones, weights are bit for bit what they are without any.

        Raises:
            SamplingError: there is none of this name.
        """
        for lora in list(self.loaded.values()) if name is None else [self._one(name)]:
            del self.loaded[lora.name]
            for handle in lora.handles:
                handle.remove()
            if lora.merged:
                self._write(model, lora)

    def cast(self, model: nn.Module) -> None:
        """Make merged weights anew from originals in the dtype of the model, as after it has changed."""
        for layer in list(self.originals):
            self._merge(model, layer)

    def record(self) -> dict[str, Any]:
        """What an image's record says of them."""
        said = [{"name": lora.name, "file": lora.fingerprint, "scale": lora.scale} for lora in self._sorted()]
        return {"loras": said} if said else {}

    def _sorted(self) -> list[Lora]:
        """By name, since a sum depends, in its last bits, on the order of what is added."""
        return [self.loaded[name] for name in sorted(self.loaded)]

    def _one(self, name: str) -> Lora:
        if name not in self.loaded:
            raise SamplingError(unknown("LoRA", name, self.loaded))
        return self.loaded[name]

    def _write(self, model: nn.Module, lora: Lora) -> None:
        for layer in lora.updates:
            self._merge(model, layer)

    def _merge(self, model: nn.Module, layer: str) -> None:
        """Write the weight of a layer: the original plus all merged updates, summed in fp32."""
        weight = model.get_submodule(layer).get_parameter("weight")
        known = layer in self.originals
        original = (self.originals.pop(layer) if known else weight.detach().cpu()).to(weight.dtype)
        updates = [
            (each.scale, each.updates[layer]) for each in self._sorted() if each.merged and layer in each.updates
        ]
        value = original
        if updates:
            self.originals[layer] = original
            value = original.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            for scale, update in updates:
                value = value + scale * update.delta(value)
        # never in place: the weight may be the original itself, or pages of a file
        weight.data = torch.empty_like(weight).copy_(value)


def _checked(scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise SamplingError(f"the scale of a LoRA is {scale!r}; it must be a finite number.")
    return float(scale)
