"""Wrappers that torch puts around modules: for compiling, for several devices, for activation checkpointing."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, (Distributed)DataParallel, FSDP and activation checkpointing add."""


def innermost(module: M) -> M:
    """Return the module within all wrappers around it; submodules may still be wrapped."""
    while (inner := next((each for name, each in module.named_children() if name in WRAPPERS), None)) is not None:
        module = cast(M, inner)
    return module


def without_replaced_methods(module: M) -> M:
    """Remove from a copy of a module, in place, the methods that were replaced on the original, to which they are bound.

    For example ``module.forward = torch.compile(module.forward)``.
    """
    for name in _replaced_methods(module):
        del module.__dict__[name]
    return module


def with_own_methods(module: M) -> M:
    """Remove replaced methods from a deep copy of a module and its submodules, in place; wrappers have made their own."""
    for each in module.modules():
        if innermost(each) is each:
            without_replaced_methods(each)
    return module


def has_replaced_methods(module: nn.Module) -> bool:
    """Return True if a method was replaced, on the module or on a submodule, by what cannot be pickled."""
    compiled_in_place = {"_compiled_call_impl"}  # is not pickled
    return any(
        innermost(each) is each and set(_replaced_methods(each)) - compiled_in_place for each in module.modules()
    )


def _replaced_methods(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and hasattr(type(module), name)]
