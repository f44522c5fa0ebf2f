"""LoKr, a change that is the Kronecker product of two matrices (Yeh et al. 2023, LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.nn.adapter_format import AdapterFormat, MisshapenTensor, Scaling, Tensors, register, require
from ldm.nn.adapters import AdapterLayer
from ldm.nn.loha import tucker

ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class LoKrLayer(AdapterLayer):
    """The LoKr change of one layer: W' = W + s f W1 (x) W2.

    Args:
        factors: tensors by their names in files. W1 is ``lokr_w1 [o1 i1]`` or the product of ``lokr_w1_a [o1 r]`` and
            ``lokr_w1_b [r i1]``; W2 is ``lokr_w2 [o2 i2]`` (``[o2 i2 k k]`` of a convolution), the product of
            ``lokr_w2_a [o2 r]`` and ``lokr_w2_b [r i2]`` (``[r i2*k*k]``), or ``lokr_t2 [r r k k]`` with
            ``[r o2]`` and ``[r i2]``.
        factor: f, alpha / r; 1 without low-rank products.
    """

    def __init__(self, factors: Tensors, factor: float):
        super().__init__()
        self.factors = nn.ParameterDict({name: nn.Parameter(each) for name, each in factors.items()})
        self.factor = factor

    @property
    def rank(self) -> int | None:
        """Rank of the low-rank products; None if there are none."""
        return _rank(self.factors)

    def delta(self, weight: Tensor) -> Tensor:
        own = {name: each.to(weight) for name, each in self.factors.items()}
        w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
        if "lokr_w2" in own:
            w2 = own["lokr_w2"]
        elif "lokr_t2" in own:
            w2 = tucker(own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
        else:
            w2 = own["lokr_w2_a"] @ own["lokr_w2_b"]
        w1 = w1.view(*w1.shape, *[1] * (w2.ndim - 2))
        return (self.factor * torch.kron(w1, w2.contiguous())).reshape(weight.shape)


class LoKrFormat(AdapterFormat):
    """LoKr in files of LyCORIS and PEFT, which have the same names."""

    kind = LoKrLayer
    endings: ClassVar[dict[str, str]] = {role: rf"\.{role}" for role in ROLES}

    def read(self, tensors: Tensors, shape: Sequence[int], scaling: Scaling) -> LoKrLayer:
        for name in ("lokr_w1", "lokr_w2"):
            if name not in tensors:
                require(tensors, (f"{name}_a", f"{name}_b"))
        for role, tensor in tensors.items():
            if tensor.ndim not in (2, 4) or not tensor.numel():
                raise MisshapenTensor(role)
        rank = _rank(tensors)
        factor = scaling.full_rank() if rank is None else scaling.for_rank(rank) / rank
        return LoKrLayer({role: tensor.clone() for role, tensor in tensors.items()}, factor)

    def write(self, layer: AdapterLayer, naming: str) -> dict[str, Tensor] | None:
        assert isinstance(layer, LoKrLayer)
        if naming != "kohya":
            return None
        if layer.rank is None and layer.factor != 1:  # such files ignore the alpha of a full product
            return None
        alpha = {} if layer.rank is None else {"alpha": torch.tensor(float(layer.factor * layer.rank))}
        return {**layer.factors, **alpha}


def _rank(tensors: Tensors | nn.ParameterDict) -> int | None:
    return next((len(tensors[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors), None)


register(LoKrFormat())
