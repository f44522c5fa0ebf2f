"""Conditions under which a forward pass may use the formulations that are faster for inference on a CPU.

They compute the same as the layers, to the rounding of the dtype, in another order of operations; none keeps a copy of a weight,
so that weights can change at any time. Training, autocast, compiled networks and other devices use the layers as they are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


def is_eager_cpu_inference(x: Tensor) -> bool:
    """Return True if ``x`` is a plain tensor on the CPU and neither gradients, autocast, compilation nor tracing are active."""
    special = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return type(x) is Tensor and x.device.type == "cpu" and not (special or torch.jit.is_tracing())


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if using the weight of ``layer`` equals calling it: no subclass (adapters), hooks or special weight."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is kind and type(layer.weight) is nn.Parameter and not hooks


@cache
def supports_onednn_linear(dtype: torch.dtype) -> bool:
    """Return True if :func:`onednn_linear` can be used and the CPU has instructions for ``dtype``."""
    native = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return native and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def has_amx() -> bool:
    """Return True if the CPU has Intel AMX."""
    return bool(torch.cpu._is_amx_tile_supported())


def uses_amx(x: Tensor) -> bool:
    """Return True if products of ``x`` are computed as tiles by AMX: in bf16, about eight times as fast as in fp32.

    There, formulations that have fewer products but more passes over memory do not pay. Compiled networks have none of these,
    and for them it is False.
    """
    return x.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and has_amx()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Compute activation(x weight^T + bias) by oneDNN: ``x [... c], weight [d c], bias [d] -> [... d]``

    The activation (none, gelu or sigmoid) is applied to the fp32 sums before they are stored. In fp32 this is faster than
    ``F.linear``, which calls MKL; in bf16 the bias costs no further pass.
    """
    algorithm = "none" if activation == "gelu" else ""  # the exact gelu, not that by tanh
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], algorithm)


def onednn_linear_times(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
    """Compute (x weight^T + bias) factor: ``x [... c], weight [d c], bias [d], factor [... d] -> [... d]``

    The fp32 sums are multiplied before they are stored.
    """
    return torch.ops.mkldnn._linear_pointwise.binary(x, factor, weight, bias, "mul")


class Linear(nn.Linear):
    """Linear layer ``[... c] -> [... d]`` that calls :func:`onednn_linear` for inference on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if uses_onednn(x, self.weight):
            return onednn_linear(x, self.weight, self.bias)
        return super().forward(x)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return True if :func:`onednn_linear` is to be used for a weight and an input, in inference and where it is faster.

    The choice depends on the size of one item of the batch, so that its result does not depend on the others.
    """
    large = x[0].numel() * weight.shape[0] >= 2**24
    same = x.dtype == weight.dtype and type(weight) is nn.Parameter
    return large and same and is_eager_cpu_inference(x) and supports_onednn_linear(x.dtype)
