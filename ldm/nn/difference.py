"""Full differences of weights and biases, as LyCORIS trains and extracts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.adapter_format import AdapterFormat, MisshapenTensor, Scaling, Tensors, register
from ldm.nn.adapters import AdapterLayer


class DifferenceLayer(AdapterLayer):
    """The difference of the weight, the bias or both of a linear layer, a convolution or a norm.

    Args:
        weight, bias: differences in the shapes of the layer's parameters; None if there is none.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None):
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def delta(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(weight.shape) if self.weight is None else self.weight.to(weight)

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(bias)

    def forward(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if not isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            return super().forward(layer, *inputs)
        (x,) = inputs
        weight = self.scale * self.delta(layer.weight)
        bias = None if self.bias is None else self.scale * self.bias.to(weight)
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


class DifferenceFormat(AdapterFormat):
    """Differences in files of LyCORIS: ``diff`` and ``diff_b``, of norms ``w_norm`` and ``b_norm``."""

    kind = DifferenceLayer
    endings: ClassVar[dict[str, str]] = {"weight": r"\.(?:diff|w_norm)", "bias": r"\.(?:diff_b|b_norm)"}

    def read(self, tensors: Tensors, shape: Sequence[int], scaling: Scaling) -> DifferenceLayer:
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is not None and weight.numel() != math.prod(shape):
            raise MisshapenTensor("weight")
        if bias is not None and bias.shape != shape[:1]:
            raise MisshapenTensor("bias")
        return DifferenceLayer(
            None if weight is None else scaling.scalar * weight.reshape(*shape),
            None if bias is None else scaling.scalar * bias,
        )

    def write(self, layer: AdapterLayer, naming: str) -> dict[str, Tensor] | None:
        assert isinstance(layer, DifferenceLayer)
        if naming != "kohya":
            return None
        norm = layer.weight is not None and layer.weight.ndim == 1
        found = {"w_norm" if norm else "diff": layer.weight, "b_norm" if norm else "diff_b": layer.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


register(DifferenceFormat())
