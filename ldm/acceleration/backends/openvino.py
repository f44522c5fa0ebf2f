"""OpenVINO: networks as programs with static shapes and constant weights for the CPU, cached on disk (extra ``openvino``)."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm import __version__
from ldm.acceleration.backend import Backend
from ldm.acceleration.constant_weights import ConstantWeights, FlatNetwork, Program
from ldm.config import config_field
from ldm.errors import SamplingError, missing_extra
from ldm.paths import expanded

MODEL = "model.xml"
"""Name of a converted model within its folder of the cache."""

CHUNK = 4096
"""Number of values that add up to one number of a fingerprint."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "f16"}
"""OpenVINO's names of the dtypes in which it computes; all others become fp32."""


@dataclass(frozen=True)
class OpenVINO(Backend, kind="openvino"):
    """Compile the denoiser and the first stage with OpenVINO for the CPU.

    Programs are stored in ``cache`` under a fingerprint of everything that they depend on, so that a later process loads them.
    """

    priority: ClassVar[int] = 2

    quantization: Literal["int8_weights"] | None = config_field(
        None, "int8_weights: weights of linear layers and convolutions of the denoiser in 8 bits"
    )
    cache: str | None = config_field("~/.cache/ldm/openvino", "folder of compiled programs; null = none", path=True)

    @classmethod
    def is_default(cls, device: torch.device) -> bool:
        return device.type == "cpu" and find_spec("openvino") is not None

    @property
    def takes_prompt_loras(self) -> bool:
        return False

    def check(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise SamplingError(
                f"the backend 'openvino' runs on the CPU, but the model is on {device}; move it there, or choose another backend."
            )
        for package in ("openvino", "nncf") if self.quantization else ("openvino",):
            if find_spec(package) is None:
                raise missing_extra(package, "the backend 'openvino'", "openvino")

    def compile(self, network: nn.Module, name: str) -> nn.Module:
        quantization = self.quantization if name == "denoiser" else None
        return ConstantWeights(network, name, self, partial(self._build, quantization))

    def _build(self, quantization: str | None, network: FlatNetwork, tensors: list[Tensor]) -> Program:
        import openvino

        core = openvino.Core()
        dtype = next((each.dtype for each in network.parameters()), torch.float32)
        properties = {"INFERENCE_PRECISION_HINT": PRECISIONS.get(dtype, "f32"), "PERFORMANCE_HINT": "LATENCY"}
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        if self.cache is None:
            return Infer(core.compile_model(convert(network, tensors, quantization), "CPU", properties | threads))
        versions = __version__, torch.__version__, openvino.__version__, core.get_property("CPU", "FULL_DEVICE_NAME")
        shapes = [(tuple(each.shape), each.dtype) for each in tensors]
        key = fingerprint(network, (versions, properties, quantization, shapes, network.constants()))
        folder = Path(expanded(self.cache)) / key
        if not (folder / MODEL).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                new = Path(temporary) / "new"
                openvino.save_model(convert(network, tensors, quantization), new / MODEL, compress_to_fp16=False)
                new.replace(folder)
            gc.collect()  # graphs of the conversion, which hold copies of the weights
        # from the file, whose weights are mapped into memory; OpenVINO puts the compiled program beside it
        return Infer(core.compile_model(folder / MODEL, "CPU", properties | threads | {"CACHE_DIR": str(folder)}))


class Infer:
    """A compiled program as a function of tensors; calls of several threads take turns."""

    def __init__(self, program: Any):
        self.request, self.lock = program.create_infer_request(), threading.Lock()

    def __call__(self, *tensors: Tensor) -> Tensor:
        import openvino

        arrays = [(each.float() if each.is_floating_point() else each).contiguous().numpy() for each in tensors]
        with self.lock:
            for index, array in enumerate(arrays):
                self.request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
            self.request.infer()
            return torch.from_numpy(self.request.get_output_tensor(0).data).clone()


class Widened(nn.Module):
    """A network with inputs and output in fp32, for which numpy has a type, whatever its own dtype."""

    def __init__(self, network: nn.Module, dtypes: Sequence[torch.dtype]):
        super().__init__()
        self.network, self.dtypes = network, dtypes

    def forward(self, *tensors: Tensor) -> Tensor:
        result: Tensor = self.network(*(each.to(dtype) for each, dtype in zip(tensors, self.dtypes, strict=True)))
        return result.float()


def convert(network: FlatNetwork, tensors: Sequence[Tensor], quantization: str | None) -> Any:
    """Return a network as a model of OpenVINO for the shapes of ``tensors``, with all floating-point inputs in fp32."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    examples = tuple(each.float() if each.is_floating_point() else each for each in tensors)
    exported = torch.export.export(Widened(network, [each.dtype for each in tensors]), examples, strict=False)
    known = set(ops_to_not_decompose())
    table = {op: function for op, function in torch.export.default_decompositions().items() if op not in known}
    decoder = TorchFXPythonDecoder(exported.run_decompositions(table).module(), dynamic_shapes=False)
    frontend = FrontEndManager().load_by_framework("pytorch")  # not openvino.convert_model, which reports its use
    model = frontend.convert(frontend.load(decoder))
    model.reshape({port: list(each.shape) for port, each in zip(model.inputs, examples, strict=True)})
    if quantization is not None:
        os.environ.setdefault("NNCF_CI", "1")  # nncf reports its use otherwise
        import nncf

        nncf.set_log_level(logging.ERROR)
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return model


def fingerprint(network: nn.Module, about: object) -> str:
    """Return a hash of a network, its weights, and everything else that a program depends on."""
    digest = hashlib.sha256(repr((network, about)).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(_sums(tensor))
    return digest.hexdigest()[:32]


def _sums(tensor: Tensor) -> bytes:
    """Return sums of the bits of neighbouring values: a checksum at the speed of memory, in the order of the storage."""
    values = tensor.detach().permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).reshape(-1)
    bits = values.view(INTEGERS[values.element_size()])
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % CHUNK))
    return bytes(padded.view(-1, CHUNK).sum(1).numpy().tobytes())
