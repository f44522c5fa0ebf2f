"""Tensors that may be sharded over the ranks (DTensor), and others that are complete on each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered from all ranks, any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return complete copies of tensors on the CPU; called on all ranks, of which those that do not ``keep`` them get none."""
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)  # one at a time, so that a device holds no more than one
        if keep:
            found[name] = full.detach().to("cpu", copy=True)
    return found


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the part of a complete tensor that a rank holds if it is sharded like ``other``, on the device of ``other``.

    A tensor that is sharded already, or that ``other`` is not sharded, is returned as it is. All ranks must have the same tensor.
    """
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def by_sharding(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the sharded tensors and the others, without empty lists; torch's multi-tensor operations take no mixture."""
    tensors = list(tensors)
    parts = ([each for each in tensors if isinstance(each, DTensor) is sharded] for sharded in (True, False))
    return [part for part in parts if part]
