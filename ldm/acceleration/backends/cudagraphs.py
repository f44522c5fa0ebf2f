"""torch.compile with inductor of complete networks, recorded as CUDA graphs, which launch all kernels at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.acceleration.backend import Backend
from ldm.acceleration.backends.inductor import Compiled
from ldm.config import config_field
from ldm.errors import SamplingError
from ldm.nn.views import view

_GRAPH_THREAD = ThreadPoolExecutor(1, "cuda-graphs")  # it begins with the first graph


@dataclass(frozen=True)
class CUDAGraphs(Backend, kind="cudagraphs"):
    """Compile the denoiser and the first stage as one graph each, and record a CUDA graph for each shape."""

    priority: ClassVar[int] = 3

    max_autotune: bool = config_field(False, "choose among several kernels by timing them; compiling takes longer")

    @classmethod
    def is_default(cls, device: torch.device) -> bool:
        return device.type == "cuda"

    def check(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise SamplingError(
                f"the backend 'cudagraphs' needs a CUDA device, but the model is on {device}; choose another backend."
            )

    def compile(self, network: nn.Module, name: str) -> nn.Module:
        compiled = view(network, ())
        mode = "max-autotune" if self.max_autotune else "reduce-overhead"
        compiled.compile(mode=mode, fullgraph=True, dynamic=False)
        return Replayed(compiled, name, self)


class Replayed(Compiled):
    """A network that replays CUDA graphs, in a thread that all of them share.

    The memory of torch's CUDA graphs belongs to the thread that recorded them, and two threads cannot record at the same time.
    """

    def forward(self, *inputs: Any) -> Tensor:
        return _GRAPH_THREAD.submit(self._replay, torch.is_inference_mode_enabled(), inputs).result()

    def _replay(self, inference: bool, inputs: tuple[Any, ...]) -> Tensor:
        with torch.inference_mode(inference), torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            return super().forward(*inputs).clone()  # the next replay writes into the same memory
