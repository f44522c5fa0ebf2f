"""What must hold for every backend that compiles weights as constants, with one whose programs are copies of the networks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm import Pipeline
from ldm.acceleration.backend import Backend
from ldm.acceleration.constant_weights import ConstantWeights, FlatNetwork
from ldm.conditioning import ConditionerConfig
from ldm.diffusion import SAMPLERS, SPECS
from ldm.errors import SamplingError
from tests.acceleration.cases import CONDITIONERS, GUIDANCE, model_with
from tests.tiny import tiny_lora, tiny_model

QUIET: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "progress": False, "output_type": "pt"}
LATENTS: dict[str, Any] = {"output_type": "latent"}
PROMPT = "a red car"


@dataclass(frozen=True)
class Snapshot(Backend, kind="snapshot"):
    """Programs are deep copies of the networks, which go on computing with the weights of that moment.

    Attributes:
        calibration: evaluations of the denoiser that are collected before.
    """

    calibration: int = 0

    @property
    def takes_prompt_loras(self) -> bool:
        return False

    def compile(self, network: nn.Module, name: str) -> nn.Module:
        wanted = self.calibration if name == "denoiser" else 0
        return ConstantWeights(network, name, self, self.copied, lambda network, tensors: (wanted, self.copied))

    def copied(self, network: FlatNetwork, examples: Sequence[Sequence[Tensor]]) -> FlatNetwork:
        copied = copy.deepcopy(network)
        seen.append([[each.clone() for each in tensors] for tensors in examples])
        return copied


seen: list[list[list[Tensor]]] = []
"""Example tensors with which the networks were compiled."""


def compiled(model: Any = None) -> Pipeline:
    pipe: Pipeline = Pipeline(model or tiny_model()).compile("snapshot", progress=False)
    return pipe


def assert_same(pipe: Pipeline, plain: Pipeline, *prompt: Any, **settings: Any) -> Tensor:
    """Assert that two pipelines make the same image, and return it."""
    expected = plain(*prompt, **(QUIET | settings))
    torch.testing.assert_close(pipe(*prompt, **(QUIET | settings)), expected, atol=1e-5, rtol=1e-4)
    made: Tensor = expected
    return made


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(tiny_lora(), tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_every_conditioner_works(kind: str) -> None:
    conditioner, conditions = CONDITIONERS[kind]
    model = model_with(conditioner)
    assert_same(compiled(copy.deepcopy(model)), Pipeline(model), **conditions, **LATENTS)


def test_the_cases_have_every_conditioner() -> None:
    assert CONDITIONERS.keys() == ConditionerConfig.kinds.keys()


@pytest.mark.parametrize("kind", GUIDANCE)
def test_every_kind_of_guidance_works(kind: str) -> None:
    assert_same(compiled(), Pipeline(tiny_model()), PROMPT, guidance=GUIDANCE[kind], num_inference_steps=4, **LATENTS)


@pytest.mark.slow
def test_every_sampler_and_batch_size_works() -> None:
    pipe, plain = compiled(), Pipeline(tiny_model())
    for sampler in SAMPLERS:
        steps = None if SPECS[sampler].adaptive else 3
        assert_same(pipe, plain, [PROMPT, "a blue sky"], sampler=sampler, num_inference_steps=steps, height=24)


def changes(lora: Path) -> dict[str, Callable[[Pipeline], object]]:
    def in_place(pipe: Pipeline) -> None:
        for parameter in pipe.model.denoiser.parameters():
            parameter.data *= 0.9

    def replaced(pipe: Pipeline) -> None:
        pipe.model.denoiser.conv_out.weight = nn.Parameter(0.5 * pipe.model.denoiser.conv_out.weight.detach())

    return {
        "load a LoRA": lambda pipe: pipe.load_lora(lora),
        "scale it": lambda pipe: pipe.set_lora_scale("style", 0.3),
        "unload it": lambda pipe: pipe.unload_lora(),
        "merge it": lambda pipe: pipe.load_lora(lora, merge=True),
        "load a state dict": lambda pipe: pipe.model.load_state_dict(tiny_model(seed=5).state_dict()),
        "change values in place": in_place,
        "replace a parameter": replaced,
        "replace a network": lambda pipe: setattr(pipe.model, "denoiser", tiny_model(seed=3).denoiser),
        "change the decoder": lambda pipe: pipe.model.first_stage.decoder.conv_out.weight.data.mul_(0.5),
        "change the dtype": lambda pipe: pipe.to(dtype=torch.float64),
    }


def test_changed_weights_take_effect(lora: Path) -> None:
    pipe, plain = compiled(), Pipeline(tiny_model())
    before = assert_same(pipe, plain, PROMPT)
    for name, change in changes(lora).items():
        change(pipe)
        change(plain)
        after = assert_same(pipe, plain, PROMPT)
        assert (after - before).abs().max() > 1e-7, name
        before = after


def test_a_network_is_compiled_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[list[int]] = []

    def count(self: Snapshot, network: FlatNetwork, examples: Sequence[Sequence[Tensor]]) -> FlatNetwork:
        built.append(list(examples[0][0].shape))
        return network

    monkeypatch.setattr(Snapshot, "copied", count)
    pipe = compiled()
    for _ in range(2):
        pipe(PROMPT, **QUIET)
        pipe(PROMPT, **(QUIET | {"height": 24}))
        pipe(PROMPT, guidance_scale=1, **QUIET)
    assert built == [[2, 4, 8, 8], [1, 4, 8, 8], [2, 4, 12, 8], [1, 4, 12, 8], [1, 4, 8, 8]]


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_copies_are_compiled_too_and_use_their_own_weights(how: str) -> None:
    pipe = compiled()
    expected = pipe(PROMPT, **QUIET)
    twin = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe))}[how](
        pipe
    )
    if how != "copy":
        for parameter in pipe.model.parameters():
            parameter.data *= 0.5
    assert twin.model.accelerator.backend == pipe.model.accelerator.backend
    assert torch.equal(twin(PROMPT, **QUIET), expected)


def test_it_is_undone_and_saved_as_any_pipeline(tmp_path: Path) -> None:
    pipe, plain = compiled(), Pipeline(tiny_model())
    assert_same(pipe, plain, PROMPT)
    assert torch.equal(
        Pipeline.from_pretrained(pipe.save_pretrained(tmp_path), dtype=torch.float32)(PROMPT, **QUIET),
        plain(PROMPT, **QUIET),
    )
    assert pipe.compile(None) is pipe
    assert pipe.model.accelerator is None
    assert torch.equal(pipe(PROMPT, **QUIET), plain(PROMPT, **QUIET))


def test_threads_share_a_compiled_pipeline() -> None:
    pipe, plain = compiled(), Pipeline(tiny_model())
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda seed: pipe(PROMPT, **(QUIET | {"seed": seed})), range(8)))
    for seed, image in enumerate(made):
        torch.testing.assert_close(image, plain(PROMPT, **(QUIET | {"seed": seed})), atol=1e-5, rtol=1e-4)


def test_loras_named_in_prompts_are_refused(lora: Path) -> None:
    with pytest.raises(
        SamplingError, match="a LoRA named in a prompt cannot act in networks that the backend 'snapshot'"
    ):
        compiled()(f"{PROMPT} <lora:style:0.5>", prompt_syntax="weighted", lora_folder=lora.parent, **QUIET)


def test_images_in_tiles_are_decoded_as_without_a_backend() -> None:
    pipe, plain = compiled(), Pipeline(tiny_model())
    for each in (pipe, plain):
        each.model.tiling = type(each.model.tiling)(tile=8, overlap=2)
    assert_same(pipe, plain, PROMPT, height=32)


def test_a_line_says_what_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    Pipeline(tiny_model()).compile("snapshot")(PROMPT, **QUIET)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "snapshot: compiling the denoiser for the input 2 x 4 x 8 x 8 ..."
    assert lines[1].startswith("snapshot: the denoiser is ready after ")
    assert lines[2] == "snapshot: compiling the decoder of the first stage for the input 1 x 4 x 8 x 8 ..."


def test_evaluations_are_collected_before_a_network_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Pipeline(tiny_model())
    expected = plain(PROMPT, **QUIET)
    pipe = Pipeline(tiny_model()).compile("snapshot", calibration=3)
    seen.clear()
    for number, programs in enumerate(
        [1, 2, 2], start=1
    ):  # two evaluations in each image: the decoder first, then both
        torch.testing.assert_close(pipe(PROMPT, **QUIET), expected, atol=1e-5, rtol=1e-4)
        assert len(seen) == programs, number
    first_stage, denoiser = seen
    assert len(first_stage) == 1
    assert not first_stage[0][0].any()
    assert len(denoiser) == 3
    levels = [max(float(each.max()) for each in tensors if each.numel() <= 2) for tensors in denoiser]
    assert levels[0] == levels[2] != levels[1]  # of the first image's two steps and the second image's first
    assert "the next 3 evaluations of the denoiser" in capsys.readouterr().err
