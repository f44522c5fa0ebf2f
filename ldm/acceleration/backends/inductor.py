"""torch.compile with inductor, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch._dynamo
from torch import Tensor, nn

from ldm.acceleration.backend import Backend
from ldm.acceleration.constant_weights import ConstantWeights, FlatNetwork, adapters_of, shape_text, shapes_of
from ldm.config import config_field
from ldm.errors import SamplingError
from ldm.nn.adapters import unwrapped
from ldm.nn.gradient_checkpointing import CheckpointedBlock
from ldm.nn.views import view

RECOMPILE_LIMIT = 1024
"""Compiled versions of a block, over all shapes and configurations, after which dynamo gives up with an error."""


@dataclass(frozen=True)
class Inductor(Backend, kind="inductor"):
    """Compile residual and transformer blocks with torch.compile; blocks of equal shape share their code.

    Weights are inputs of the code, so that changing them, or loading a LoRA, needs no or only a partial recompilation.
    """

    priority: ClassVar[int] = 1

    freezing: bool = config_field(
        False,
        "compile each network as one graph with constant weights, which the CPU reads in the order of its kernels; takes "
        "minutes, and again after any change of the weights",
    )
    max_autotune: bool = config_field(False, "choose among several kernels by timing them; compiling takes longer")

    @classmethod
    def is_default(cls, device: torch.device) -> bool:
        return device.type != "cuda"

    @property
    def takes_prompt_loras(self) -> bool:
        return not self.freezing

    def check(self, device: torch.device) -> None:
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler
            from torch._inductor.exc import InvalidCxxCompiler

            try:
                get_cpp_compiler()
            except (InvalidCxxCompiler, RuntimeError):
                raise SamplingError(
                    "the backend 'inductor' needs a C++ compiler, but none is found; install g++, or set CXX to a compiler."
                ) from None

    def compile(self, network: nn.Module, name: str) -> nn.Module:
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, RECOMPILE_LIMIT)
        if self.freezing:
            return ConstantWeights(network, name, self, self._freeze)
        blocks = [path for path, each in unwrapped(network).named_modules() if isinstance(each, CheckpointedBlock)]
        compiled = view(network, blocks)
        for block in [compiled.get_submodule(path) for path in blocks] or [compiled]:
            block.compile(**self._settings())
        return Compiled(compiled, name, self)

    def _settings(self) -> dict[str, Any]:
        options = {"max_autotune": self.max_autotune, "freezing": self.freezing}
        return {"fullgraph": True, "dynamic": False, "options": options}

    def _freeze(self, network: FlatNetwork, examples: Sequence[Sequence[Tensor]]) -> Callable[..., Tensor]:
        # a code object of its own: dynamo would find the code compiled with the former weights
        forward = FlatNetwork.forward
        call = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
        return partial(torch.compile(call, **self._settings()), network)


class Compiled(nn.Module):
    """A network that torch compiles for each set of input shapes, and of adapters, with a line when it does."""

    def __init__(self, network: nn.Module, name: str, backend: Backend):
        super().__init__()
        self.network, self.name, self.backend = network, name, backend
        self.parts = [*network.modules()]
        self.seen: set[Any] = set()

    def forward(self, *inputs: Any) -> Tensor:
        inputs_and_adapters = shapes_of(inputs), adapters_of(self.parts)
        if inputs_and_adapters not in self.seen:
            self.seen.add(inputs_and_adapters)
            self.backend.announce(
                f"{self.backend.kind}: compiling the blocks of the {self.name} for the input {shape_text(inputs)}."
            )
        result: Tensor = self.network(*inputs)
        return result
