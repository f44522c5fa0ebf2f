"""Views of a module: copies that share its parameters, to change some of its parts for one use."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from ldm.nn.wrappers import innermost, without_replaced_methods

M = TypeVar("M", bound=nn.Module)


def view(module: M, paths: Iterable[str]) -> M:
    """Return a shallow copy of a module in which some submodules are copies, too.

    These can be changed (given other attributes, submodules or parameters) without any effect on ``module``. All parameters,
    and all other submodules, are shared. Networks that contain a copy are without their wrappers.

    Args:
        module: the module, which stays as it is.
        paths: names of the submodules to copy, without those of wrappers; those that contain them are copied as well.
    """
    module = innermost(module)
    new = without_replaced_methods(copy.copy(module))  # the copy leaves out what module.compile() compiled
    new._modules, new._parameters = dict(module._modules), dict(module._parameters)
    below: dict[str, list[str]] = defaultdict(list)
    for name, _, rest in (path.partition(".") for path in paths):
        below[name] += [rest] if rest else []
    for name, inner in below.items():
        new._modules[name] = view(module.get_submodule(name), inner)
    return new
