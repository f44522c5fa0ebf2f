"""When a network is trained on a CPU, where the backward passes of some of torch's kernels are slow and others serve better."""

from __future__ import annotations

import torch
from torch import Tensor


def trains_on_cpu(*tensors: Tensor) -> bool:
    """Return True if gradients of any of the tensors are computed on a CPU, by kernels of torch and not of ``torch.compile``."""
    return (
        tensors[0].device.type == "cpu"
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and not torch.compiler.is_compiling()
    )
