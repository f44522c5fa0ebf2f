"""The global state of torch, which another library in the process may have changed, changes no image and no training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm import Pipeline, editing
from ldm.formats import load
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment
from tests.tiny import SIZE, tiny_model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device() == torch.device(device)
    finally:
        torch.set_default_device(None)


STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: default_device("meta"),
    "cpu:0": lambda: default_device("cpu:0"),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
states = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


def images(pipe: Pipeline) -> list[bytes]:
    """Generated and edited images; all kinds of noise and of guidance occur."""
    given: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "progress": False}
    picture = Image.new("RGB", (SIZE, SIZE), "teal")
    made = [
        pipe("a red apple", sampler=sampler, **given)[0]
        for sampler in ("dpmpp_2m", "dpmpp_sde", "euler_ancestral", "unipc")
    ]
    made += pipe(["(a:1.2) red [apple:car:0.5]", "b"], guidance_scale=[2, 3], prompt_syntax="weighted", **given)
    made += editing.inpaint(pipe, "a red car", picture, Image.new("L", picture.size, 99), blur=1, **given)
    made += editing.outpaint(pipe, "a red car", picture, left=2, **given)
    made += editing.interpolate(pipe, "a", seeds=(1, 2), frames=2, num_inference_steps=1, progress=False)
    made.append(pipe.preview(torch.ones(1, 4, 8, 8, dtype=torch.float32, device="cpu"))[0])
    return [image.tobytes() for image in made]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe = Pipeline(tiny_model())
    pipe.save_pretrained(folder / "native.safetensors")
    pipe.save_pretrained(folder / "ldm.safetensors", to="ldm")
    pipe.save_pretrained(folder / "diffusers", to="diffusers")
    return folder


@pytest.fixture(scope="module")
def expected(saved: Path) -> list[bytes]:
    return images(Pipeline.from_pretrained(saved / "native.safetensors", "cpu", torch.float32))


@states
def test_the_global_state_of_torch_changes_no_image(
    saved: Path, expected: list[bytes], state: Callable[[], AbstractContextManager[object]]
) -> None:
    pipe = Pipeline.from_pretrained(saved / "native.safetensors", "cpu", torch.float32)
    with state():
        assert images(pipe) == expected


@states
@pytest.mark.parametrize("name", ["native.safetensors", "ldm.safetensors", "diffusers"])
def test_the_global_state_of_torch_changes_no_loaded_model(
    saved: Path, name: str, state: Callable[[], AbstractContextManager[object]]
) -> None:
    usual = load(saved / name)
    with state():
        model = load(saved / name)
        assert not any(parameter.is_inference() for parameter in model.parameters())
    assert model.config == usual.config
    for key, tensor in usual.state_dict().items():
        loaded = model.state_dict()[key]
        assert (loaded.dtype, loaded.device) == (tensor.dtype, tensor.device), key
        assert torch.equal(loaded, tensor), key


def train_all(folder: Path, state: Callable[[], AbstractContextManager[object]]) -> dict[str, torch.Tensor]:
    """The weights of all stages after one step."""
    folder.mkdir()
    steps = [
        f"{stage}.train.{name}=1" for stage in ("vae", "clip", "denoiser") for name in ("max_steps", "validate_every")
    ]
    experiment = tiny_experiment(folder, *steps)
    weights: dict[str, torch.Tensor] = {}
    for stage in ("vae", "clip", "denoiser"):
        with state():
            file = train_stage(experiment, stage)
        weights |= {f"{stage} {name}": tensor for name, tensor in load_file(file).items()}
    return weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train_all(tmp_path_factory.mktemp("training") / "usual", torch.enable_grad)


@states
def test_the_global_state_of_torch_changes_no_training_step(
    tmp_path: Path, trained: dict[str, torch.Tensor], state: Callable[[], AbstractContextManager[object]]
) -> None:
    weights = train_all(tmp_path / "state", state)
    assert weights.keys() == trained.keys()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, trained[name])] == []
    assert {tensor.dtype for tensor in weights.values()} == {tensor.dtype for tensor in trained.values()}
