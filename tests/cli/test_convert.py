from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import load
from ldm.cli.convert import main
from ldm.formats import save
from ldm.formats.tensors import read_metadata
from tests.tiny import tiny_model

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
    for line in ("layout           native", "v, schedule scaled_linear", "float16", "as its metadata say"):
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
