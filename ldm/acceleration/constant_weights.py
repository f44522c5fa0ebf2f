"""Networks that are compiled with their weights as constants, for one set of input shapes at a time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import ref

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ldm.acceleration.backend import Backend, ChecksWeights
from ldm.nn.adapters import unwrapped
from ldm.nn.attention import AttentionOptions
from ldm.nn.conditioning import Conditioning, Context

PROGRAMS = 4
"""Number of shapes for which a network stays compiled; each holds a copy of the weights."""

SAMPLES = 8
"""Values of each parameter that are compared before a sampling, for changes that leave no other trace."""

TENSOR = "tensor"
"""Placeholder of a tensor among the inputs of a network."""

Program = Callable[..., Tensor]
"""A compiled network: the tensors among its inputs, in order, to its output."""

Build = Callable[["FlatNetwork", Sequence[Sequence[Tensor]]], Program]
"""Compiles a network for the shapes of its tensors; given are those of some evaluations, which are zeros without calibration."""


class FlatNetwork(nn.Module):
    """A network as a function of tensors alone, with its adapters as submodules, as exporters need it.

    Args:
        network: the network.
        inputs: its inputs; those that are not tensors, within dataclasses as well, become constants.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[Any]):
        super().__init__()
        self.network = unwrapped(network)
        adapted = {name: vars(part).get("adapters", ()) for name, part in self.network.named_modules()}
        self.adapters = nn.ModuleList(each for adapters in adapted.values() for each in adapters)
        self.adapted = [(name, len(adapters)) for name, adapters in adapted.items() if adapters]
        leaves, self.structure = flattened(inputs)
        self.leaves = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        leaves = [next(given) if leaf is TENSOR else leaf for leaf in self.leaves]
        result: Tensor = self.network(*pytree.tree_unflatten(leaves, self.structure))
        return result

    def constants(self) -> tuple[object, ...]:
        """Return what the output depends on besides tensors and modules: constant inputs, config, scales of adapters."""
        numbers = [
            [(name, value) for name, value in vars(each).items() if isinstance(value, float)] for each in self.adapters
        ]
        return self.leaves, self.structure, getattr(self.network, "config", None), numbers, self.adapted


@dataclass
class Evaluations:
    """Tensors of real evaluations that are collected for a program, of ``wanted`` in all, and what then compiles it."""

    wanted: int
    build: Build
    tensors: list[list[Tensor]] = field(default_factory=list)


class ConstantWeights(ChecksWeights):
    """A network that is compiled when it is called with new shapes, and again after its weights or adapters have changed.

    Args:
        network: the network, of which a weak reference is kept.
        name: its name for messages.
        backend: the backend, for messages.
        build: compiles a network for the shapes of its tensors.
        calibration: returns, for a network and the tensors of one evaluation, the number of evaluations that are computed by the
            network itself before it is compiled, and what compiles it in place of ``build``. None = no evaluation, and ``build``.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        backend: Backend,
        build: Build,
        calibration: Callable[[FlatNetwork, Sequence[Tensor]], tuple[int, Build]] | None = None,
    ):
        super().__init__()
        self.network, self.name, self.backend, self.build = ref(network), name, backend, build
        self.calibration = calibration
        self.programs: OrderedDict[Any, Program] = OrderedDict()
        self.evaluations: dict[Any, Evaluations] = {}
        self.lock = threading.RLock()
        self.state: tuple[Any, ...] = ()
        self.values = b""
        self.check_weights()

    def forward(self, *inputs: Any) -> Tensor:
        leaves, structure = flattened(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = structure, shapes_of(inputs)
        with self.lock:
            if (state := self._state()) != self.state:
                self._forget()
                self.state = state
            if key not in self.programs:
                if (evaluations := self._evaluations(key, inputs, tensors)) is None:
                    result: Tensor = self._alive()(*inputs)
                    return result
                self.programs[key] = self._program(inputs, evaluations)
                while len(self.programs) > PROGRAMS:
                    self.programs.popitem(last=False)
            self.programs.move_to_end(key)
            program = self.programs[key]
        return program(*tensors)

    def check_weights(self) -> None:
        with self.lock:
            network = self._alive()
            weights = [*network.parameters(), *network.buffers()]
            values = b"".join(_some_values(each) for each in weights)
            if values != self.values:
                self._forget()
            self.values, self.parts, self.weights = values, [*network.modules()], weights

    def _forget(self) -> None:
        self.programs.clear()
        self.evaluations.clear()

    def _evaluations(self, key: Any, inputs: Sequence[Any], tensors: Sequence[Tensor]) -> Evaluations | None:
        """Return what the program for a key is compiled with, or None while evaluations are collected for it."""
        if key not in self.evaluations:
            wanted, build = 0, self.build
            if self.calibration:
                wanted, build = self.calibration(FlatNetwork(self._alive(), inputs), tensors)
            self.evaluations[key] = Evaluations(wanted, build)
            if wanted:
                self.backend.announce(
                    f"{self.backend.kind}: the next {wanted} evaluations of the {self.name} for the input {shape_text(inputs)} "
                    "are computed without the program, and calibrate it."
                )
        evaluations = self.evaluations[key]
        with torch.inference_mode(False):  # tensors that the compiler may use as it likes
            if len(evaluations.tensors) < evaluations.wanted:
                evaluations.tensors.append([each.clone() for each in tensors])
                return None
            if not evaluations.wanted:
                evaluations.tensors = [[torch.zeros_like(each) for each in tensors]]
            return self.evaluations.pop(key)

    def _alive(self) -> nn.Module:
        network = self.network()
        assert network is not None, "a network outlives what it was compiled to"
        return network

    def _state(self) -> tuple[Any, ...]:
        """Return what differs after the weights were replaced or written in place, or the adapters changed."""
        return _versions(self.weights), adapters_of(self.parts)

    def _program(self, inputs: Sequence[Any], evaluations: Evaluations) -> Program:
        start, size = time.perf_counter(), shape_text(inputs)
        self.backend.announce(f"{self.backend.kind}: compiling the {self.name} for the input {size} ...")
        with torch.inference_mode(False), torch.no_grad():
            program = evaluations.build(FlatNetwork(self._alive(), inputs), evaluations.tensors)
        self.backend.announce(
            f"{self.backend.kind}: the {self.name} is ready after {time.perf_counter() - start:.1f} s."
        )
        return program


def flattened(inputs: Sequence[Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """Return tensors and constants within the inputs of a network, and the structure that holds them."""
    _register()
    return pytree.tree_flatten(tuple(inputs))


def shapes_of(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Return what a network with these inputs is compiled for: shapes and dtypes, and the values of constants."""
    leaves, _ = flattened(inputs)
    return tuple((each.shape, each.dtype, each.device) if isinstance(each, Tensor) else each for each in leaves)


def shape_text(inputs: Sequence[Any]) -> str:
    """Return the shape of the first input for a message, as in "2 x 4 x 64 x 64"."""
    return " x ".join(map(str, inputs[0].shape))


def adapters_of(parts: Iterable[nn.Module]) -> tuple[Any, ...]:
    """Return a key of the live adapters of modules: which they are, their scales, and the versions of their weights."""
    adapters = [each for part in parts for each in vars(part).get("adapters", ())]
    return tuple((id(each), each.scale, _versions(each.parameters())) for each in adapters)


def _versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors)


def _some_values(tensor: Tensor) -> bytes:
    count = min(SAMPLES, tensor.numel())
    if not count:
        return b""
    chosen = tensor.detach().as_strided((count,), (tensor.numel() // count,))  # no copy, whatever its memory format
    return bytes(chosen.double().cpu().numpy().tobytes())


@cache
def _register() -> None:
    """Let torch look into the records that networks take."""
    for record in (Conditioning, Context, AttentionOptions):
        torch.export.register_dataclass(record)
