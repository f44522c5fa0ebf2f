"""OpenVINO: networks as programs with static shapes and constant weights for the CPU, cached on disk (extra ``openvino``)."""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm import __version__
from ldm.acceleration.backend import Backend
from ldm.acceleration.constant_weights import Build, ConstantWeights, FlatNetwork, Program
from ldm.config import config_field
from ldm.errors import SamplingError, first_line, missing_extra
from ldm.paths import expanded

MODEL, ANGLES = "model.xml", "angles.xml"
"""Names of a converted model, and of the part that is computed in fp32, within its folder of the cache."""

CONVERSION = 2
"""Number of the way in which networks are converted; raising it, with every change of that way, leaves stored programs aside."""

CHUNK = 512
"""Number of 64-bit words that add up to one number of a fingerprint."""

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "f16"}
"""OpenVINO's names of the dtypes in which it computes; all others become fp32."""


@dataclass(frozen=True)
class OpenVINO(Backend, kind="openvino"):
    """Compile the denoiser and the first stage with OpenVINO for the CPU.

    Programs are stored in ``cache`` under a fingerprint of everything that they depend on, so that a later process loads them.
    The least recently used ones are removed when all of them together exceed ``cache_gib``.
    """

    priority: ClassVar[int] = 2

    quantization: Literal["int8_weights", "int8_hybrid"] | None = config_field(
        None,
        "int8_weights: weights of the denoiser's linear layers and convolutions in 8 bits; int8_hybrid: convolutions' inputs too",
    )
    calibration: int = config_field(
        20,
        "int8_hybrid: evaluations of the denoiser, computed without OpenVINO, from which the ranges of the inputs are taken",
    )
    cache: str | None = config_field("~/.cache/ldm/openvino", "folder of compiled programs; null = none", path=True)
    cache_gib: float = config_field(
        20.0, "largest size of the folder in GiB; beyond it the least recently used programs are removed"
    )

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
        plain = self if name == "denoiser" else replace(self, quantization=None)
        calibration = plain._calibration if plain.quantization == "int8_hybrid" else None
        return ConstantWeights(network, name, self, plain._build, calibration)

    def _calibration(self, network: FlatNetwork, tensors: Sequence[Tensor]) -> tuple[int, Build]:
        key = self._key(network, tensors)
        stored = self.cache is not None and (Path(expanded(self.cache)) / key).is_dir()
        return 0 if stored else self.calibration, partial(self._build_as, key)

    def _key(self, network: FlatNetwork, tensors: Sequence[Tensor]) -> str:
        import openvino

        versions = (
            CONVERSION,
            __version__,
            torch.__version__,
            openvino.__version__,
            core().get_property("CPU", "FULL_DEVICE_NAME"),
        )
        shapes = [(tuple(each.shape), each.dtype) for each in tensors]
        options = self.quantization, self.calibration if self.quantization == "int8_hybrid" else None
        return fingerprint(network, (versions, _properties(network), options, shapes, network.constants()))

    def _build(self, network: FlatNetwork, examples: Sequence[Sequence[Tensor]]) -> Program:
        return self._build_as(self._key(network, examples[0]), network, examples)

    def _build_as(self, key: str, network: FlatNetwork, examples: Sequence[Sequence[Tensor]]) -> Program:
        properties = _properties(network)
        with tempfile.TemporaryDirectory() if self.cache is None else nullcontext(expanded(self.cache)) as cache:
            folder = Path(cache) / key
            try:
                if not folder.is_dir():
                    _write(folder, network, examples, self.quantization)
                # from files, whose weights are mapped into memory; OpenVINO writes the compiled program into the same folder
                properties |= {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "CACHE_DIR": str(folder)}
                angles = None
                if (folder / ANGLES).is_file():
                    angles = core().compile_model(
                        folder / ANGLES, "CPU", properties | {"INFERENCE_PRECISION_HINT": "f32"}
                    )
                program = Infer(angles, core().compile_model(folder / MODEL, "CPU", properties), _dtype(network))
                if self.cache is not None:
                    with suppress(OSError):  # the folder may be read-only, or another process may remove programs
                        os.utime(folder)
                        trim(folder, self.cache_gib)
                return program
            except OSError as error:
                raise SamplingError(
                    f"the cache {folder.parent} cannot be used ({first_line(error)}); set the option cache to another folder, or "
                    "to None."
                ) from None
            except RuntimeError as error:
                raise SamplingError(
                    f"OpenVINO cannot compile this {type(network.network).__name__} ({first_line(error)}); compile with "
                    "the backend 'inductor'."
                ) from error


@cache
def core() -> Any:
    """Return OpenVINO's runtime, one for the process.

    Each has a stack of its own for the handlers of signals, and restores the former one at its end. If it is not the last
    that was made, signals then use memory that was freed, and the process crashes at the next one that it handles
    (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def _properties(network: FlatNetwork) -> dict[str, str]:
    """Return how a network is compiled."""
    return {"INFERENCE_PRECISION_HINT": PRECISIONS.get(_dtype(network), "f32"), "PERFORMANCE_HINT": "LATENCY"}


def _dtype(network: FlatNetwork) -> torch.dtype:
    return next((each.dtype for each in network.parameters()), torch.float32)


def _write(folder: Path, network: FlatNetwork, examples: Sequence[Sequence[Tensor]], quantization: str | None) -> None:
    """Convert a network and write it into a new folder, if no other process has done so meanwhile."""
    import openvino

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        model = convert(network, examples[0])
        if quantization is not None:
            model = quantized(model, examples if quantization == "int8_hybrid" else None)
        exact = _properties(network)["INFERENCE_PRECISION_HINT"] == "f32"
        if not exact and (angles := split_angles(model)) is not None:
            openvino.save_model(angles, new / ANGLES, compress_to_fp16=False)
        openvino.save_model(model, new / MODEL, compress_to_fp16=False)
        del model
        if not folder.is_dir():
            new.replace(folder)
    gc.collect()  # graphs of the conversion, which hold copies of the weights


def trim(kept: Path, gib: float) -> None:
    """Remove the least recently used programs until the cache of ``kept``, which always stays, has at most ``gib`` GiB."""
    programs = [each for each in kept.parent.iterdir() if re.fullmatch("[0-9a-f]{32}", each.name)]
    left = gib * 2**30
    for folder in sorted(programs, key=lambda each: (each == kept, each.stat().st_mtime), reverse=True):
        left -= sum(file.stat().st_size for file in folder.iterdir())
        if left < 0 and folder != kept:
            shutil.rmtree(folder, ignore_errors=True)


class Infer:
    """Compiled programs as a function of tensors; calls of several threads take turns.

    Args:
        angles: computes further inputs of ``main`` from its other inputs; None if there are none.
        main: computes the output.
        dtype: dtype of the output.
    """

    def __init__(self, angles: Any, main: Any, dtype: torch.dtype):
        self.dtype = dtype
        self.angles = None if angles is None else angles.create_infer_request()
        self.main, self.lock = main.create_infer_request(), threading.Lock()

    def __call__(self, *tensors: Tensor) -> Tensor:
        import openvino

        inputs = [openvino.Tensor(each, shared_memory=True) for each in arrays_of(tensors)]
        with self.lock:
            if self.angles is not None:
                self.angles.infer(inputs)
                inputs += self.angles.output_tensors
            self.main.infer(inputs)
            return torch.from_numpy(self.main.output_tensors[0].data).to(self.dtype, copy=True)


def convert(network: FlatNetwork, tensors: Sequence[Tensor]) -> Any:
    """Return a network as a model of OpenVINO in fp32, for the shapes of ``tensors``.

    In whatever precision a program computes, the model is in fp32: with weights and inputs in bf16, the convolutions of few
    channels gave NaN (OpenVINO 2026.4).
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    if any(each.dtype != torch.float32 for each in network.parameters()):
        network = copy.deepcopy(network).float()
    examples = tuple(each.float() if each.is_floating_point() else each for each in tensors)
    exported = torch.export.export(network, examples, strict=False)
    known = set(ops_to_not_decompose())
    table = {op: function for op, function in torch.export.default_decompositions().items() if op not in known}
    decoder = TorchFXPythonDecoder(exported.run_decompositions(table).module(), dynamic_shapes=False)
    frontend = FrontEndManager().load_by_framework("pytorch")  # not openvino.convert_model, which reports its use
    model = frontend.convert(frontend.load(decoder))
    model.reshape({port: list(each.shape) for port, each in zip(model.inputs, examples, strict=True)})
    return model


def split_angles(model: Any) -> Any:
    """Remove sines and cosines from a model, which gets their values as further inputs, and return a model that computes them.

    In bf16 or fp16 the angle of a timestep can be off by a radian, so that these have to be computed in fp32.
    """
    import openvino
    from openvino import opset13

    waves = [op for op in model.get_ordered_ops() if op.get_type_name() in ("Sin", "Cos")]
    if not waves:
        return None
    angles = openvino.Model([op.output(0) for op in waves], model.get_parameters()).clone()
    values = [opset13.parameter(op.get_output_shape(0), openvino.Type.f32) for op in waves]
    for op, value in zip(waves, values, strict=True):
        op.output(0).replace(value.output(0))
    model.add_parameters(values)
    model.validate_nodes_and_infer_types()
    return angles


def quantized(model: Any, examples: Sequence[Sequence[Tensor]] | None) -> Any:
    """Return a model whose linear layers and convolutions have weights in 8 bits, with a scale for each output channel.

    Args:
        model: the model.
        examples: inputs of real evaluations, from which the ranges of the inputs of convolutions are taken, which then are in 8
            bits too; None = they stay as they are.
    """
    os.environ.setdefault("NNCF_CI", "1")  # nncf reports its use otherwise
    import nncf

    nncf.set_log_level(logging.ERROR)
    mode = nncf.CompressWeightsMode.INT8_ASYM
    if examples is None:
        return nncf.compress_weights(model, mode=mode)
    model = nncf.compress_weights(model, mode=mode, ignored_scope=nncf.IgnoredScope(types=["Convolution"]))
    others = {op.get_type_name() for op in model.get_ops()} - {"Convolution", "Constant", "Parameter", "Result"}
    return nncf.quantize(
        model,
        nncf.Dataset([arrays_of(each) for each in examples]),
        subset_size=len(examples),
        ignored_scope=nncf.IgnoredScope(types=sorted(others), validate=False),
    )


def arrays_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Return tensors as a model takes them, floating-point numbers in fp32."""
    return [(each.float() if each.is_floating_point() else each).contiguous().numpy() for each in tensors]


def fingerprint(network: nn.Module, about: object) -> str:
    """Return a hash of a network, its weights, and everything else that a program depends on."""
    digest = hashlib.sha256(repr((network, about)).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(_sums(tensor))
    return digest.hexdigest()[:32]


def _sums(tensor: Tensor) -> bytes:
    """Return sums of neighbouring 64-bit words: a checksum at the speed of memory, in the order of the storage."""
    values = tensor.detach().permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).reshape(-1)
    data = values.view(torch.uint8)
    missing = -len(data) % (8 * CHUNK)
    if missing or data.storage_offset() % 8:
        data = torch.nn.functional.pad(data, (0, missing))  # a copy
    return bytes(data.view(torch.int64).view(-1, CHUNK).sum(1).numpy().tobytes())
