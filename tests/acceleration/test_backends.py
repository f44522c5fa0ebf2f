from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from ldm import Pipeline
from ldm.acceleration import default_backend, known_backends
from ldm.acceleration.backends import openvino
from ldm.acceleration.backends.cudagraphs import CUDAGraphs, Replayed
from ldm.cli.sample import main
from ldm.diffusion import SAMPLERS, SPECS, Guidance
from ldm.errors import ConfigError, MissingExtraError, SamplingError
from tests.acceleration.cases import CONDITIONERS, GUIDANCE, model_with
from tests.acceleration.test_constant_weights import LATENTS, PROMPT, QUIET, assert_same, changes
from tests.tiny import tiny_lora, tiny_model

ROOT = Path(__file__).parents[2]
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="needs the package openvino, of the extra openvino")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(tiny_lora(), tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


# What can be chosen


def test_unknown_backends_and_options_are_refused() -> None:
    pipe = Pipeline(tiny_model())
    with pytest.raises(SamplingError, match="unknown backend 'inducter'; did you mean 'inductor'"):
        pipe.compile("inducter")
    with pytest.raises(ConfigError, match="the backend 'inductor': unknown key 'freeze'; did you mean 'freezing'"):
        pipe.compile("inductor", freeze=True)
    with pytest.raises(SamplingError, match="the backend 'cudagraphs' needs a CUDA device, but the model is on cpu"):
        pipe.compile("cudagraphs")
    with pytest.raises(SamplingError, match="the backend 'openvino' runs on the CPU, but the model is on cuda"):
        known_backends()["openvino"]().check(CUDA)
    assert pipe.model.accelerator is None


def test_the_default_is_the_fastest_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_backend(CUDA) == "cudagraphs"
    assert default_backend(CPU) == ("openvino" if HAS_OPENVINO else "inductor")
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    assert default_backend(CPU) == "inductor"
    with pytest.raises(MissingExtraError, match=r"the backend 'openvino' needs .* pip install 'ldm\[openvino\]'"):
        Pipeline(tiny_model()).compile("openvino")


def test_a_missing_compiler_is_named() -> None:
    message = r"the backend 'inductor' needs a C\+\+ compiler, but none is found"
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(SamplingError, match=message):
        Pipeline(tiny_model()).compile("inductor")


def test_the_command_compiles_and_refuses_options_without_a_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["sample.py", PROMPT, "--model", str(tmp_path), *map(str, arguments)])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().err

    Pipeline(tiny_model()).save_pretrained(tmp_path)
    assert "unknown backend 'fast'; Known: auto, " in run("--compile", "fast")
    assert "give --compile with a backend too" in run("--compile-option", "freezing=true")
    output = run("--compile", "snapshot", "--steps", 1, "--out", tmp_path / "image.png")
    assert "snapshot: compiling the denoiser for the input 2 x 4 x 8 x 8 ..." in output
    assert (tmp_path / "image.png").exists()


# cudagraphs


def test_all_graphs_are_replayed_in_one_thread() -> None:
    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((threading.get_ident(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return x + 1

    def call(network: Replayed, inference: bool) -> torch.Tensor:
        with torch.inference_mode(inference):
            return network(torch.zeros(2))

    seen = set[tuple[int, bool, bool]]()
    networks = [Replayed(Network(), name, CUDAGraphs(progress=False)) for name in ("denoiser", "decoder")]
    with ThreadPoolExecutor(4) as threads:
        made = [threads.submit(call, network, inference) for network in networks for inference in (True, False)]
    assert all(torch.equal(each.result(), torch.ones(2)) for each in made)
    assert len({thread for thread, _, _ in seen}) == 1
    assert {(grad, inference) for _, grad, inference in seen} == {(False, True), (False, False)}


# inductor


@pytest.fixture
def unoptimized() -> Iterator[None]:
    """Compile C++ without optimization, which takes half as long."""
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONDITIONERS)
def test_conditioners_work_with_inductor(kind: str, unoptimized: None) -> None:
    conditioner, conditions = CONDITIONERS[kind]
    pipe = Pipeline(model_with(conditioner)).compile("inductor", progress=False)
    assert_same(pipe, Pipeline(model_with(conditioner)), **conditions, **LATENTS)


@pytest.mark.slow
def test_guidance_and_samplers_work_with_inductor(unoptimized: None) -> None:
    pipe, plain = Pipeline(tiny_model()).compile("inductor", progress=False), Pipeline(tiny_model())
    for guidance in GUIDANCE.values():
        assert_same(pipe, plain, PROMPT, guidance=guidance, **LATENTS)
    for sampler in SAMPLERS:
        if SPECS[sampler].adaptive:  # rounding may change its steps
            settings = {"sampler": sampler, "seed": 1, "progress": False, **LATENTS}
            assert (pipe(PROMPT, **settings) - plain(PROMPT, **settings)).abs().max() < 0.2
        else:
            assert_same(pipe, plain, PROMPT, sampler=sampler, **LATENTS)


@pytest.mark.slow
def test_loras_and_changed_weights_act_in_blocks_of_inductor(lora: Path, unoptimized: None) -> None:
    """Weights are inputs of the compiled blocks; a LoRA that is named in a prompt acts too."""
    pipe, plain = Pipeline(tiny_model()).compile("inductor", progress=False), Pipeline(tiny_model())
    named = {"prompt_syntax": "weighted", "lora_folder": lora.parent}
    assert_same(pipe, plain, f"{PROMPT} <lora:style:0.5>", **named, **LATENTS)
    for name in ("load a LoRA", "unload it", "merge it", "load a state dict", "change values in place"):
        for each in (pipe, plain):
            changes(lora)[name](each)
        assert_same(pipe, plain, PROMPT, **LATENTS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"freezing": True}], ids=["regional", "freezing"])
def test_inductor_makes_the_same_images(options: dict[str, Any]) -> None:
    pipe, plain = Pipeline(tiny_model()).compile("inductor", progress=False, **options), Pipeline(tiny_model())
    assert_same(pipe, plain, PROMPT)
    for each in (pipe, plain):
        for parameter in each.model.denoiser.parameters():
            parameter.data *= 0.9
    assert_same(pipe, plain, PROMPT)


def test_equal_blocks_share_their_code() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = tiny_model(denoiser=UNET | {"middle_depth": 6})
    compiled = known_backends()["inductor"](progress=False).compile(model.denoiser, "denoiser")
    blocks = [each for each in compiled.modules() if each._compiled_call_impl is not None]
    assert len(blocks) == 5 + 9, "residual and transformer blocks"
    for block in blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    pipe = Pipeline(model)
    pipe.model.denoiser = compiled.network
    pipe(PROMPT, **QUIET)
    assert counter.frame_count == 3, "two residual blocks of different widths, and the transformer block"


UNET = {
    "kind": "unet",
    "levels": [{"width": 16, "blocks": 1, "depth": 1}],
    "heads": 2,
    "groups": 4,
    "context_width": 16,
}


# openvino


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "programs")


@needs_openvino
def test_openvino_makes_the_same_images_and_loads_programs_from_its_cache(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, plain = Pipeline(tiny_model()).compile("openvino", cache=cache, progress=False), Pipeline(tiny_model())
    assert_same(pipe, plain, PROMPT)
    monkeypatch.setattr(openvino, "convert", None)
    assert_same(Pipeline(tiny_model()).compile("openvino", cache=cache, progress=False), plain, PROMPT)
    other = Pipeline(tiny_model(seed=1)).compile("openvino", cache=cache, progress=False)
    with pytest.raises(TypeError, match="NoneType"):
        other(PROMPT, **QUIET)


@needs_openvino
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pipe = Pipeline(tiny_model()).compile("openvino", cache=str(tmp_path / "file"), progress=False)
    with pytest.raises(SamplingError, match=r"the cache .*file cannot be used .* another folder, or to None"):
        pipe(PROMPT, **QUIET)


def test_the_least_recently_used_programs_leave_the_cache(tmp_path: Path) -> None:
    names = [f"{number:032x}" for number in range(4)]
    for age, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_bytes(bytes(1024))
        os.utime(tmp_path / name, (0, 1000 - age))
    (tmp_path / "tmpabc").mkdir()  # a program that another process is writing
    openvino.trim(tmp_path / names[3], 3 * 1024 / 2**30)
    assert sorted(each.name for each in tmp_path.iterdir()) == [*names[:2], names[3], "tmpabc"]
    openvino.trim(tmp_path / names[3], 0.0)
    assert sorted(each.name for each in tmp_path.iterdir()) == [names[3], "tmpabc"]


@needs_openvino
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "class", "several", "inpaint"])
def test_conditioners_work_with_openvino(kind: str) -> None:
    conditioner, conditions = CONDITIONERS[kind]
    pipe = Pipeline(model_with(conditioner)).compile("openvino", cache=None, progress=False)
    assert_same(pipe, Pipeline(model_with(conditioner)), **conditions, **LATENTS)


@needs_openvino
@pytest.mark.slow
def test_guidance_and_changed_weights_work_with_openvino(lora: Path) -> None:
    pipe, plain = Pipeline(tiny_model()).compile("openvino", cache=None, progress=False), Pipeline(tiny_model())
    for guidance in (Guidance(3.0, interval=(0.5, 3.0)), Guidance(3.0, perturbed=2.0)):
        assert_same(pipe, plain, PROMPT, guidance=guidance, **LATENTS)
    for name in ("load a LoRA", "scale it", "unload it", "load a state dict"):
        for each in (pipe, plain):
            changes(lora)[name](each)
        assert_same(pipe, plain, PROMPT, **LATENTS)


@needs_openvino
@pytest.mark.slow
def test_bf16_is_as_close_to_fp32_as_without_openvino(cache: str) -> None:
    exact = Pipeline(tiny_model())(PROMPT, **QUIET)
    plain, pipe = (Pipeline(tiny_model()).to(dtype=torch.bfloat16) for _ in range(2))
    pipe.compile("openvino", cache=cache, progress=False)
    errors = [(each(PROMPT, **QUIET) - exact).square().mean().sqrt().item() for each in (plain, pipe)]
    assert errors[1] < 2 * errors[0]
    latents = [each.model.encode(exact * 2 - 1) for each in (plain, pipe)]
    torch.testing.assert_close(latents[0], latents[1], atol=0.05, rtol=0.05)


@needs_openvino
@pytest.mark.slow
def test_weights_in_8_bits_hardly_change_an_image(cache: str) -> None:
    pytest.importorskip("nncf", reason="needs the package nncf, of the extra openvino")
    exact = Pipeline(tiny_model())(PROMPT, **QUIET)
    pipe = Pipeline(tiny_model()).compile("openvino", cache=cache, quantization="int8_weights", progress=False)
    assert 0 < (pipe(PROMPT, **QUIET) - exact).square().mean().sqrt() < 0.05


@needs_openvino
@pytest.mark.slow
def test_convolutions_in_8_bits_are_calibrated_by_the_first_evaluations(
    cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf", reason="needs the package nncf, of the extra openvino")
    hashed, fingerprint = [], openvino.fingerprint

    def counted(network: Any, about: object) -> str:
        hashed.append(type(network.network).__name__)
        return fingerprint(network, about)

    monkeypatch.setattr(openvino, "fingerprint", counted)
    exact = Pipeline(tiny_model())(PROMPT, **QUIET)
    options: dict[str, Any] = {
        "cache": cache,
        "quantization": "int8_hybrid",
        "calibration": QUIET["num_inference_steps"],
    }
    first = Pipeline(tiny_model()).compile("openvino", **options)
    calibrating, quantized = first(PROMPT, **QUIET), first(PROMPT, **QUIET)
    torch.testing.assert_close(calibrating, exact, atol=1e-4, rtol=1e-4)
    assert 0 < (quantized - exact).square().mean().sqrt() < 0.05
    assert "computed without the program" in capsys.readouterr().err
    later = Pipeline(tiny_model()).compile("openvino", **options)
    torch.testing.assert_close(later(PROMPT, **QUIET), quantized)
    assert "computed without the program" not in capsys.readouterr().err
    assert hashed.count("UNet") == 2  # once in each pipeline


SIGNAL = """
import gc, signal
from ldm import Pipeline
from tests.tiny import tiny_model

def compiled():
    pipe = Pipeline(tiny_model()).compile("openvino", cache=None, progress=False)
    pipe("a red car", num_inference_steps=1, progress=False)
    return pipe

first = compiled()
second = compiled()
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


@needs_openvino
@pytest.mark.slow
def test_signals_are_handled_after_programs_are_gone() -> None:
    # OpenVINO changes the stack on which the handlers of signals run
    run = subprocess.run([sys.executable, "-c", SIGNAL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "handled\n"), run.stderr
