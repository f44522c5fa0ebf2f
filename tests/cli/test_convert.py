from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import load
from ldm.cli.convert import main
from ldm.clip.model import CLIPConfig
from ldm.config import from_dict
from ldm.formats import read, save
from ldm.formats.native import CLIP, save_module
from ldm.formats.tensors import read_metadata
from tests.tiny import TOKENIZER, tiny_model

Command = Callable[..., int | str | None]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("own") / "model.safetensors", dtype=torch.float16)


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Command:
    def command(*arguments: object) -> int | str | None:
        """The exit code of the command, run in this process."""
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        return exit_info.value.code

    return command


def test_a_model_goes_to_every_format_and_back(
    convert: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, folder, back = tmp_path / "one.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    assert convert(file, one, "--to", "ldm", "--dtype", "fp32") == 0
    assert convert(one, folder, "--to", "diffusers") == 0
    assert convert(folder, back) == 0
    assert capsys.readouterr().out == f"wrote {one}\nwrote {folder}\nwrote {back}\n"
    assert load(back).config.denoiser == load(file).config.denoiser


def test_the_dtype_stays_as_the_source_has_it(convert: Command, file: Path, tmp_path: Path) -> None:
    assert convert(file, tmp_path / "one.safetensors", "--to", "ldm") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "one.safetensors").values()} == {torch.float16}


def test_inspect_says_what_there_is_and_how_that_is_known(
    convert: Command, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(file, "--inspect") == 0
    told = capsys.readouterr().out
    for line in ("layout           native", "v, schedule scaled_linear", "float16", "from its metadata"):
        assert line in told
    assert f"fingerprint      {load(file, dtype=None).fingerprint}" in told


def test_inspect_lists_all_that_does_not_fit(
    convert: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(load(file), tmp_path / "one.safetensors", "ldm")
    tensors, metadata = load_file(path), read_metadata(path)
    gone = [name for name in tensors if "to_q" in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, path, metadata)
    assert convert(path, "--inspect") == 2
    told = capsys.readouterr()
    assert f"{len(gone)} missing" in told.err
    assert all(name.removeprefix("model.diffusion_model.") in told.out for name in gone)


def test_mistakes_are_told(convert: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(file) == 2
    assert "name a target behind the source, or ask for --inspect" in capsys.readouterr().err
    assert convert(file, tmp_path / "x", "--dtype", "fp23") == 2
    assert "unknown dtype 'fp23'; did you mean 'fp32'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "by", [("native", "diffusers", "native"), ("ldm", "native"), ("diffusers", "ldm", "diffusers")]
)
def test_a_lone_vae_goes_to_every_format_bit_for_bit(by: tuple[str, ...], convert: Command, tmp_path: Path) -> None:
    model = tiny_model(first_stage={"kind": "autoencoder_kl", "widths": [32, 32], "blocks": 1})
    model.first_stage.latent_mean.zero_()
    model.first_stage.latent_std.fill_(2.0)
    folder = save(model, tmp_path / "folder", "diffusers")
    source, expected = folder / "vae", model.first_stage.state_dict()
    for number, to in enumerate(by):
        target = tmp_path / (f"{number}" if to == "diffusers" else f"{number}.safetensors")
        assert convert(source, target, "--to", to) == 0
        source = target
    part = read(source).part("first_stage")
    assert part.config == model.config.first_stage
    assert part.state.keys() == expected.keys()
    assert all(torch.equal(part.state[name], tensor) for name, tensor in expected.items())


def test_a_clip_goes_to_its_formats(convert: Command, tmp_path: Path) -> None:
    text = {"vocab_size": 300, "context_length": 12, "width": 64, "layers": 1, "heads": 1}
    image = {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "heads": 1}
    clip = from_dict(CLIPConfig, {"text": text, "image": image, "embed_dim": 16}).build()
    source = tmp_path / "clip.safetensors"
    save_module(source, CLIP, clip, clip.config, TOKENIZER)
    for to in ("transformers", "native", "open_clip", "native"):
        target = tmp_path / f"{len(list(tmp_path.iterdir()))}{'.safetensors' if to == 'native' else ''}"
        assert convert(source, target, "--to", to) == 0
        source = target
    state = load_file(source)
    assert all(torch.equal(state[name], tensor) for name, tensor in clip.state_dict().items())


def test_what_cannot_be_alone_is_told(
    convert: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(load(file), tmp_path / "folder", "diffusers")
    assert convert(folder / "unet", tmp_path / "x.safetensors") == 2
    assert "a single U-Net is written as ldm, diffusers, not as native" in capsys.readouterr().err
    assert convert(folder / "text_encoder", tmp_path / "x.safetensors") == 2
    assert "a single text encoder is written as ldm, transformers, not as native" in capsys.readouterr().err
    unet = {"kind": "unet", "levels": [{"width": 64, "blocks": 1, "depth": 1}], "context_width": 16, "head_width": 64}
    model = tiny_model(first_stage={"kind": "autoencoder_kl", "widths": [32], "blocks": 1}, denoiser=unet)
    one = load_file(save(model, tmp_path / "one.safetensors", "ldm"))
    two = {name: tensor for name, tensor in one.items() if not name.startswith("cond_stage_model.")}
    save_file(two, tmp_path / "two.safetensors")
    assert convert(tmp_path / "two.safetensors", tmp_path / "x.safetensors") == 2
    assert (
        "neither a complete model nor a single network; name what is missing (text_encoder)" in capsys.readouterr().err
    )


def test_a_text_encoder_goes_to_a_folder_with_its_tokenizer(convert: Command, file: Path, tmp_path: Path) -> None:
    encoder = save(load(file), tmp_path / "folder", "diffusers") / "text_encoder"
    assert convert(encoder, tmp_path / "alone", "--to", "transformers") == 0
    model = load(file)
    again = load(file, text_encoder=tmp_path / "alone")
    assert model.tokenizer is not None
    assert again.tokenizer is not None
    assert again.tokenizer.fingerprint() == model.tokenizer.fingerprint()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_lone_network_goes_where_a_whole_model_may(
    convert: Command, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = save(load(file), tmp_path / "folder", "diffusers") / "vae"
    for target, to, told in (
        (tmp_path / "x.ckpt", "ldm", "would be a pickle"),
        (tmp_path / "x.safetensors", "diffusers", "is not a folder, which diffusers needs"),
        (tmp_path / "folder", "native", "would hide a file written there"),
    ):
        assert convert(vae, target, "--to", to) == 2
        assert told in capsys.readouterr().err
    assert convert(vae, tmp_path / "plain", "--to", "native") == 0
    assert (tmp_path / "plain" / "model.safetensors").is_file()
