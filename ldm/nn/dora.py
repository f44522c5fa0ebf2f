"""DoRA, weight-decomposed adaptation (Liu et al. 2024, arXiv 2402.09353): W' = m V / ||V||, where V is W with another change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.nn.adapter_format import (
    AdapterFormat,
    MisshapenTensor,
    Scaling,
    Tensors,
    format_of,
    read_layer,
    register,
)
from ldm.nn.adapters import AdapterLayer


class DoRALayer(AdapterLayer):
    """The DoRA change of one layer, m V / ||V|| - W with V = W + inner(W), norms in fp32.

    The scale multiplies this change: W' = W + s (m V / ||V|| - W). PEFT instead multiplies the inner change, within the norm; the
    two agree at 0 (unless m is not the norm of W) and at 1.

    Args:
        inner: the change within the norm, such as a LoRA.
        magnitude: m, in a shape that broadcasts with the weight: ``[out 1 ...]`` for norms of the outputs (the paper's),
            ``[1 in ...]`` for norms of the inputs.
    """

    def __init__(self, inner: AdapterLayer, magnitude: Tensor):
        super().__init__()
        self.inner, self.magnitude = inner, nn.Parameter(magnitude)

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        return self.inner.bias_delta(bias)

    def delta(self, weight: Tensor) -> Tensor:
        base = weight.float()
        v = base + self.inner.delta(base)
        dims = [dim for dim, side in enumerate(self.magnitude.shape) if side == 1]
        # no gradient through the norm: section 4.3 of the paper
        norm = torch.linalg.vector_norm(v.detach(), dim=dims or None, keepdim=True)
        return (v * (self.magnitude.float().to(v.device) / norm.clamp_min(torch.finfo(norm.dtype).tiny)) - base).to(
            weight
        )


class DoRAFormat(AdapterFormat):
    """DoRA in files of LyCORIS (``dora_scale``, around any change) and PEFT (``lora_magnitude_vector``, around a LoRA)."""

    kind = DoRALayer
    endings: ClassVar[dict[str, str]] = {
        "dora_scale": r"\.dora_scale",
        "magnitude": r"\.lora_magnitude_vector(?:\.\w+)*",
    }

    def recognizes(self, roles: Collection[str]) -> bool:
        return any(role in self.endings for role in roles)

    def read(self, tensors: Tensors, shape: Sequence[int], scaling: Scaling) -> DoRALayer:
        role = next(role for role in self.endings if role in tensors)
        inner = read_layer({each: tensors[each] for each in tensors if each not in self.endings}, shape, scaling)
        magnitude, ones = tensors[role], [1] * (len(shape) - 1)
        by_input = role == "dora_scale" and magnitude.ndim > 1 and magnitude.shape[0] == 1 != shape[0]
        sides = [1, shape[1], *ones[1:]] if by_input else [shape[0], *ones]
        if magnitude.numel() != shape[1 if by_input else 0]:
            raise MisshapenTensor(role)
        return DoRALayer(inner, magnitude.reshape(sides).clone())

    def write(self, layer: AdapterLayer, naming: str) -> dict[str, Tensor] | None:
        assert isinstance(layer, DoRALayer)
        form = format_of(layer.inner)
        inner = form.write(layer.inner, naming) if form is not None and naming == "kohya" else None
        return None if inner is None else {**inner, "dora_scale": layer.magnitude}


register(DoRAFormat())
