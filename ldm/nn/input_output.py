"""Marks of the input and output layers of networks, which some optimizers train differently from hidden layers."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

L = TypeVar("L", bound=nn.Module)

_MARK = "is_input_or_output"


def input_or_output(layer: L) -> L:
    """Mark a layer as one that maps from the inputs of a network, or to its outputs, and return it."""
    setattr(layer, _MARK, True)
    return layer


def is_input_or_output(layer: nn.Module) -> bool:
    """Return True if a layer was marked by :func:`input_or_output`."""
    return getattr(layer, _MARK, False)
