"""Running networks on tensors that have shapes but no values, to count operations and memory without a device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def remove_values(module: nn.Module) -> None:
    """Replace the parameters and buffers of a module on the meta device by tensors without values that claim to be on the CPU.

    Unlike meta tensors they can be mixed with tensors on the CPU, and autocast and the choice of attention kernels treat them
    like these. A result that depends on one of them has no values either.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    replaced: dict[int, Tensor] = {}

    def replacement(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in replaced:
            fake: Tensor = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            replaced[id(tensor)] = (
                nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
            )
        return replaced[id(tensor)]

    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            tensors |= {name: replacement(tensor) for name, tensor in tensors.items() if tensor is not None}


def autocast(precision: str) -> AbstractContextManager[object]:
    """Return the autocast of fp32, bf16 or fp16 for tensors that claim to be on the CPU."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16 if precision == "bf16" else torch.float16)


def compute_norms_in_fp32(module: nn.Module) -> None:
    """Let norms compute in fp32, as autocast does on CUDA but not on the CPU."""
    for each in module.modules():
        if isinstance(each, (nn.GroupNorm, nn.LayerNorm)):
            each.register_forward_pre_hook(lambda norm, inputs: (inputs[0].float(),))


class CostCounter(TorchDispatchMode):
    """Counts floating-point operations, and the bytes of the tensors that exist; for tensors with and without values.

    A number that is read from a tensor without values is 0.

    Args:
        existing: tensors that exist before.
        trained: those of them whose gradients are counted separately.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention, by torch's formulas.
        peak: most bytes at any time.
        gradients: bytes of gradients at that time.
    """

    def __init__(self, existing: Iterable[Tensor], trained: Iterable[nn.Parameter]):
        super().__init__()
        self._sizes: dict[int, int] = {}  # bytes of each storage, by its address
        self._gradients: set[int] = set()  # addresses of the storages of gradients
        self._now = self._gradients_now = 0
        self.flops = self.peak = self.gradients = 0
        for tensor in existing:
            self._add(tensor)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.zeros((), dtype=args[0].dtype).item()
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._add(each)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = storage.nbytes()
        self._now += storage.nbytes()
        weakref.finalize(storage, self._remove, address).atexit = False
        if self._now > self.peak:
            self.peak, self.gradients = self._now, self._gradients_now

    def _remove(self, address: int) -> None:
        size = self._sizes.pop(address)
        self._now -= size
        if address in self._gradients:
            self._gradients.remove(address)
            self._gradients_now -= size

    def _add_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        address = parameter.grad.untyped_storage()._cdata
        if address not in self._gradients:
            self._gradients.add(address)
            self._gradients_now += self._sizes[address]
