"""LoHa, a change that is the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.nn.adapter_format import AdapterFormat, MisshapenTensor, Scaling, Tensors, register, require
from ldm.nn.adapters import AdapterLayer

MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


class LoHaLayer(AdapterLayer):
    """The LoHa change of one layer: W' = W + s (alpha / r) (A1 B1) * (A2 B2).

    Args:
        factors: A1 ``[out r]``, B1 ``[r in]`` (or ``[r in*k*k]`` of a convolution), A2, B2.
        cores: T1, T2 ``[r r k k]`` of a Tucker decomposition; with these the factors of a convolution are A ``[r out]`` and
            B ``[r in]``, and each product is T over its first two dimensions with A and B.
        alpha: the change is multiplied by alpha / r.
    """

    def __init__(self, factors: Sequence[Tensor], cores: Sequence[Tensor], alpha: float):
        super().__init__()
        self.factors = nn.ParameterList(nn.Parameter(each) for each in factors)
        self.cores = nn.ParameterList(nn.Parameter(each) for each in cores)
        self.alpha = alpha

    @property
    def rank(self) -> int:
        return int(self.factors[1].shape[0])

    def delta(self, weight: Tensor) -> Tensor:
        a1, b1, a2, b2 = (each.to(weight) for each in self.factors)
        if len(self.cores):
            t1, t2 = (each.to(weight) for each in self.cores)
            product = tucker(t1, a1, b1) * tucker(t2, a2, b2)
        else:
            product = (a1 @ b1) * (a2 @ b2)
        return (self.alpha / self.rank * product).view_as(weight)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Multiply a core ``[r q k k]`` by matrices ``[r out]`` and ``[q in]``: ``[out in k k]``."""
    return torch.einsum("rqkl,ro,qi->oikl", core, a, b)


class LoHaFormat(AdapterFormat):
    """LoHa in files of LyCORIS and PEFT, which have the same names."""

    kind = LoHaLayer
    endings: ClassVar[dict[str, str]] = {role: rf"\.{role}" for role in MATRICES + CORES}

    def read(self, tensors: Tensors, shape: Sequence[int], scaling: Scaling) -> LoHaLayer:
        roles = CORES if any(role in tensors for role in CORES) else ()
        require(tensors, MATRICES + roles)
        for role in MATRICES:
            if tensors[role].ndim != 2:
                raise MisshapenTensor(role)
        rank = tensors["hada_w1_b"].shape[0]
        if not rank:
            raise MisshapenTensor("hada_w1_b")
        factors, cores = ([tensors[role].clone() for role in some] for some in (MATRICES, roles))
        return LoHaLayer(factors, cores, scaling.for_rank(rank))

    def write(self, layer: AdapterLayer, naming: str) -> dict[str, Tensor] | None:
        assert isinstance(layer, LoHaLayer)
        if naming != "kohya":
            return None
        tensors = dict(zip(MATRICES + CORES, [*layer.factors, *layer.cores], strict=False))
        return tensors | {"alpha": torch.tensor(float(layer.alpha))}


register(LoHaFormat())
