"""A kind of denoiser that describes itself is saved and loaded in all formats, and this file is all that it takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm import load
from ldm.config import config_field
from ldm.denoiser import DenoiserConfig
from ldm.errors import CheckpointError
from ldm.formats import FORMATS, read, save
from ldm.nn.conditioning import Conditioning
from ldm.nn.network_format import (
    KINDS,
    FolderFormat,
    KeyMapping,
    KeyTable,
    NetworkKind,
    SingleFileFormat,
    Values,
    inferring,
    register,
)
from tests.tiny import tiny_model


@dataclass(frozen=True)
class ToyConfig(DenoiserConfig, kind="toy_denoiser"):
    """A convolution with a shift by the mean of the context."""

    in_channels: int = config_field(4, "channels of the latent")
    out_channels: int = config_field(4, "channels of the latent")
    context_width: int = config_field(16, "width of the context")
    vector_width: ClassVar[None] = None

    def build(self) -> ToyDenoiser:
        return ToyDenoiser(self)


del DenoiserConfig.kinds["toy_denoiser"]  # known while a test of this file runs


class ToyDenoiser(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(config.in_channels, config.out_channels, 3, padding=1)
        self.shift = nn.Linear(config.context_width, config.out_channels)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Conditioning) -> Tensor:
        assert cond.context is not None
        return self.conv(x) + self.shift(cond.context.mean(dim=1))[:, :, None, None]


class ToyFile(SingleFileFormat):
    prefixes: ClassVar = {"model.diffusion_model.": "denoiser"}
    marks = ("toy_conv.",)

    def key_table(self, config: ToyConfig, names: Iterable[str], values: Values) -> KeyTable:
        return {name: KeyMapping(f"toy_{name}") for name in names}

    def infer_config(self, tensors: Any, source: object) -> ToyConfig:
        with inferring("toy denoiser", source):
            return ToyConfig(*tensors["toy_conv.weight"].shape[1::-1], tensors["toy_shift.weight"].shape[1])


class ToyFolder(FolderFormat):
    component, library, classes = "denoiser", "diffusers", ("ToyModel",)
    folders: ClassVar = {"toy": "denoiser"}
    weights = ("diffusion_pytorch_model",)

    def key_table(self, config: ToyConfig, names: Iterable[str], values: Values) -> KeyTable:
        return {name: KeyMapping(f"model.{name}") for name in names}

    def read_config(self, values: Values, names: Any, where: object) -> ToyConfig:
        return ToyConfig(values["in"], values["out"], values["context"])

    def write_config(self, config: ToyConfig, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        return {
            "_class_name": "ToyModel",
            "in": config.in_channels,
            "out": config.out_channels,
            "context": config.context_width,
        }


@pytest.fixture
def toy() -> Iterator[Any]:
    register(NetworkKind(ToyConfig, "toy denoiser", (ToyFile(),), (ToyFolder(),)))
    DenoiserConfig.kinds["toy_denoiser"] = ToyConfig
    vae = {"kind": "autoencoder_kl", "widths": [32, 32], "blocks": 1}
    tower = {"vocab_size": 300, "context_length": 12, "width": 64, "layers": 1, "heads": 1}
    conditioner = {"kind": "text", "tower": tower}
    denoiser = {"kind": "toy_denoiser", "context_width": 64}
    model = tiny_model(first_stage=vae, conditioner=conditioner, denoiser=denoiser)
    model.first_stage.latent_mean.zero_()
    model.first_stage.latent_std.fill_(1 / 0.18215)
    yield model
    del KINDS[ToyConfig], DenoiserConfig.kinds["toy_denoiser"]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    state, again = model.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


@pytest.mark.parametrize("to", FORMATS)
def test_it_is_saved_and_loaded(to: str, toy: Any, tmp_path: Path) -> None:
    again = load(save(toy, tmp_path / "model", to))
    assert again.config.denoiser == toy.config.denoiser
    assert_same(toy, again)
    x, sigma, cond = torch.randn(2, 4, 8, 8), torch.ones(2), toy.conditioner({"text": ["a", "b"]})
    assert torch.equal(toy.denoise(x, sigma, cond), again.denoise(x, sigma, cond))


def test_an_ldm_file_without_metadata_is_recognized_by_its_names(toy: Any, tmp_path: Path) -> None:
    tensors = load_file(save(toy, tmp_path / "own.safetensors", "ldm"))
    save_file(tensors, tmp_path / "bare.safetensors")
    found = read(tmp_path / "bare.safetensors")
    assert found.part("denoiser").config == toy.config.denoiser
    own = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in own.items() if "toy_" in name}, tmp_path / "single.safetensors")
    single = read(tmp_path / "single.safetensors").part("denoiser")
    assert all(torch.equal(single.state[name], tensor) for name, tensor in toy.denoiser.state_dict().items())


def test_its_folder_is_a_source_by_itself(toy: Any, tmp_path: Path) -> None:
    folder = save(toy, tmp_path / "model", "diffusers")
    assert json.loads((folder / "model_index.json").read_text())["toy"] == ["diffusers", "ToyModel"]
    assert read(folder / "toy").part("denoiser").config == toy.config.denoiser
    with torch.no_grad():
        toy.denoiser.conv.bias.add_(1)
    assert_same(toy, load(folder, denoiser=save(toy, tmp_path / "other", "diffusers") / "toy"))


@pytest.mark.parametrize(("to", "target"), [("ldm", "an LDM file"), ("diffusers", "a diffusers folder")])
def test_a_kind_without_a_description_is_refused_by_name(to: str, target: str, toy: Any, tmp_path: Path) -> None:
    del KINDS[ToyConfig]
    try:
        with pytest.raises(
            CheckpointError, match=f"^{target} has no place for a toy_denoiser as denoiser; write a native"
        ):
            save(toy, tmp_path / "x", to)
        assert_same(toy, load(save(toy, tmp_path / "native")))
    finally:
        register(NetworkKind(ToyConfig, "toy denoiser"))
