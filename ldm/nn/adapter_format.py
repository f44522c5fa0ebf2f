"""Interface by which a kind of adapter layer describes its tensors in files.

A kind (:class:`AdapterFormat`) is registered next to its :class:`ldm.nn.adapters.AdapterLayer`, in a module of
:mod:`ldm.nn`. :mod:`ldm.formats.lora` finds the kinds by iteration; it reads and writes files, and is independent of kinds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from ldm.discovery import import_modules
from ldm.nn.adapters import AdapterLayer

Tensors = Mapping[str, Tensor]
"""Tensors of one layer by their role, a key of :attr:`AdapterFormat.endings`."""


@dataclass(frozen=True)
class Scaling:
    """Factors of a layer: alpha, in a tensor of the file or in PEFT's config, and a scalar.

    Args:
        tensor: value of the layer's ``alpha`` tensor; None if it has none.
        alpha, rank: of PEFT's config; None if the file has no such config.
        rank_stabilized: divide alpha by the root of the rank (``use_rslora``; Kalajdzievski 2023, arXiv 2312.03732).
        scalar: trained factor of the whole change (``use_scalar`` of LyCORIS).
    """

    tensor: float | None = None
    alpha: float | None = None
    rank: int | None = None
    rank_stabilized: bool = False
    scalar: float = 1.0

    def for_rank(self, rank: int) -> float:
        """Return the number that, divided by the rank, is the factor of a change of this rank: alpha, by default ``rank``."""
        if self.tensor is not None or self.alpha is None:
            return self.scalar * (rank if self.tensor is None else self.tensor)
        return self.scalar * self.alpha * (math.sqrt(rank) if self.rank_stabilized else 1)

    def full_rank(self) -> float:
        """Return the factor of a change without a low-rank product: the scalar, and alpha / rank of PEFT's config.

        LyCORIS ignores the alpha tensor of such a layer, PEFT does not ignore its config.
        """
        return self.scalar if self.alpha is None or not self.rank else self.for_rank(self.rank) / self.rank


class MissingTensor(Exception):
    """A layer lacks the tensor of a role, which is the argument."""


class MixedKinds(Exception):
    """A layer has tensors of several kinds of adapter."""


class MisshapenTensor(Exception):
    """The tensor of a role, which is the argument, has a shape that does not fit the layer."""


class AdapterFormat:
    """Description of a kind of adapter layer in files.

    Attributes:
        kind: class of the layers.
        endings: role of each tensor of a layer to its name after that of the layer, as a regular expression.
    """

    kind: ClassVar[type[AdapterLayer]]
    endings: ClassVar[Mapping[str, str]]

    def recognizes(self, roles: Collection[str]) -> bool:
        """Return True if a layer with tensors of these roles is of this kind."""
        return bool(roles) and set(roles) <= self.endings.keys()

    def read(self, tensors: Tensors, shape: Sequence[int], scaling: Scaling) -> AdapterLayer:
        """Build the layer.

        Args:
            tensors: floating-point tensors of the layer.
            shape: shape of the weight that the layer changes.
            scaling: its alpha.

        Raises:
            MissingTensor, MisshapenTensor: the tensors are not those of such a layer.
        """
        raise NotImplementedError

    def write(self, layer: AdapterLayer, naming: str) -> dict[str, Tensor] | None:
        """Return the tensors of the layer by the ends of their names; None if ``naming`` has no such kind.

        In the naming ``kohya`` they include ``alpha``, in ``diffusers`` alpha belongs to the config.
        """
        return None


FORMATS: list[AdapterFormat] = []
"""Registered kinds; see :func:`formats`."""


def register(form: AdapterFormat) -> None:
    """Register a kind of adapter layer."""
    FORMATS.append(form)


@cache
def formats() -> Sequence[AdapterFormat]:
    """Return all kinds, after importing the modules of :mod:`ldm.nn`."""
    import_modules("ldm.nn")
    return tuple(FORMATS)


def read_layer(tensors: Tensors, shape: Sequence[int], scaling: Scaling) -> AdapterLayer:
    """Build the adapter layer whose kind has tensors of these roles.

    Raises:
        MissingTensor, MisshapenTensor, MixedKinds: the tensors are not those of such a layer.
    """
    form = next((form for form in formats() if form.recognizes(tensors.keys())), None)
    if form is None:
        raise MixedKinds if tensors else MissingTensor("down")
    return form.read(tensors, shape, scaling)


def format_of(layer: AdapterLayer) -> AdapterFormat | None:
    """Return the format of a layer; None if no kind of file holds such layers."""
    return next((form for form in formats() if type(layer) is form.kind), None)


def require(tensors: Tensors, roles: Iterable[str]) -> None:
    """Raise MissingTensor for the first of these roles that has no tensor."""
    for role in roles:
        if role not in tensors:
            raise MissingTensor(role)
