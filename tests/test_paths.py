from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import Pipeline, load
from ldm.cli.common import new_app
from ldm.config import Kind, from_dict, read_yaml
from ldm.data.shards import find_shards
from ldm.errors import ConfigError, PathError
from ldm.formats.clip import load_clip, save_clip
from ldm.formats.lora import read_lora, write_lora
from ldm.image_arguments import read_image
from ldm.image_output import Images, check_animation
from ldm.modalities.semantic import SEMANTIC
from ldm.nn.lora import new_lora
from ldm.paths import expanded
from ldm.sampling_settings import SamplingSettings
from ldm.training.experiment import Experiment, load_config
from tests.experiments import EXPERIMENT, write_experiment
from tests.tiny import TOKENIZER, tiny_model

SPELLINGS = ["~/{}", "$HOME/{}", "${{HOME}}/{}"]
"""Ways to write a file of the home folder."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, which is not the working folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return folder


# The expansion itself


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_home_folder_and_variables_are_expanded(home: Path, spelling: str) -> None:
    assert expanded(spelling.format("a/b")) == expanded(Path(spelling.format("a/b"))) == str(home / "a" / "b")


@pytest.mark.parametrize("text", ["emoji", "owner/name", "a/~/b", "a/{000..012}.tar", "$", "a$", "5$7", "", "a~"])
def test_other_texts_are_unchanged(home: Path, text: str) -> None:
    assert expanded(text) == text


def test_an_existing_file_keeps_its_name(home: Path) -> None:
    Path("a$UNSET.png").touch()
    assert expanded("a$UNSET.png") == "a$UNSET.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$UNSET/x", r"\$UNSET, but the environment variable UNSET is not set"),
        ("x/${UNSET}.tar", r"\$\{UNSET\}, but the environment variable UNSET is not set"),
        ("$EMPTY/x", "EMPTY is not set"),
        ("a\0b", r"the path 'a\\x00b' is invalid; name a file or folder"),
        ("~no-such-user/x", "begins with the home folder ~no-such-user, which does not exist"),
    ],
)
def test_an_undefined_variable_or_home_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(PathError, match=message):
        expanded(text)


# Config fields


def path_fields() -> Iterator[str]:
    """Class and name of the fields marked as paths, in all configs that an experiment can have."""
    seen: set[type] = set()

    def visit(hint: Any) -> Iterator[str]:
        for argument in typing.get_args(hint):
            yield from visit(argument)
        if not isinstance(hint, type) or hint in seen:
            return
        seen.add(hint)
        if issubclass(hint, Kind) and not hasattr(hint, "kind"):
            for entry in hint.kinds.values():
                yield from visit(entry)
        elif dataclasses.is_dataclass(hint):
            hints = typing.get_type_hints(hint)
            for field in dataclasses.fields(hint):
                if field.metadata.get("path"):
                    yield f"{hint.__name__}.{field.name}"
                yield from visit(hints[field.name])

    yield from visit(Experiment)


def test_every_config_field_that_names_a_file_is_a_path() -> None:
    assert set(path_fields()) == {
        "Experiment.run_dir",
        "ShardsData.train",
        "ShardsData.val",
        "ShardsData.test",
        "WeightedSource.source",
        "ShardCacheConfig.folder",
        "EncodedConfig.folder",
        "VAEStage.checkpoint",
        "CLIPStage.checkpoint",
        "CLIPStage.frozen_source",
        "PerceptualConfig.checkpoint",
        "RepresentationAlignmentConfig.checkpoint",
        "TrainConfig.init",
        "ByteBPEConfig.path",
        "TransformerConditionerConfig.checkpoint",
    }


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("place", ["file", "override"])
def test_paths_of_a_config_are_expanded(home: Path, spelling: str, place: str) -> None:
    write_experiment(home)
    keys = ["run_dir", "vae.checkpoint", "clip.tokenizer.path", "denoiser.train.init", "data.train", "data.val"]
    values = dict.fromkeys(keys, spelling.format("x"))
    given = [f"{key}={value}" for key, value in values.items()]
    if place == "file":
        text = f"base: {spelling.format('tiny.yaml')}\nrun_dir: {spelling.format('x')}\ndata: {{train: '{values['data.train']}'}}"
        Path("mine.yaml").write_text(text)
        given = given[1:4] + given[5:]
    else:
        Path("mine.yaml").write_text(f"base: {home / 'tiny.yaml'}")
    experiment = load_config("mine.yaml", [*given, f"data.test=['{spelling.format('a')}', emoji]"])
    found = {key: _at(experiment, key) for key in keys}
    assert found == dict.fromkeys(keys, str(home / "x"))
    assert _at(experiment, "data.test") == (str(home / "a"), "emoji")
    assert experiment.folder == home / "x"


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def test_an_undefined_variable_in_a_config_is_named_with_its_place(home: Path) -> None:
    config = write_experiment(home)
    with pytest.raises(ConfigError, match=r"run_dir: the path '\$UNSET/x' contains \$UNSET, but"):
        load_config(config, ["run_dir=$UNSET/x"])
    with pytest.raises(ConfigError, match=r"\$\{UNSET\} is neither a key of the config nor an environment variable"):
        load_config(config, ["run_dir=${UNSET}/x"])


def test_a_key_of_the_config_is_preferred_to_a_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("name", "of-the-environment")
    Path("a.yaml").write_text("name: mine\nrun_dir: ${HOME}/${name}\nsaid: \\${HOME}")
    assert read_yaml("a.yaml") == {"name": "mine", "run_dir": f"{home}/mine", "said": "${HOME}"}


@pytest.mark.parametrize("run_dir", ["file", "file/run"])
def test_a_run_folder_that_is_a_file_is_an_error(home: Path, run_dir: str) -> None:
    Path("file").touch()
    with pytest.raises(ConfigError, match=f"run_dir is {run_dir}, but file is a file; name a folder"):
        load_config(write_experiment(home), [f"run_dir={run_dir}"])


# Functions that take paths


def _shards(path: str, home: Path) -> None:
    (home / "x.tar").touch()
    assert find_shards(f"{path}.tar", "train") == find_shards(f"{path}*", "train") == [home / "x.tar"]


def _images(path: str, home: Path) -> None:
    assert Images([Image.new("RGB", (2, 2))]).save(f"{path}.png") == [home / "x.png"]
    assert read_image(f"{path}.png").shape == (3, 2, 2)
    assert check_animation(f"{path}.gif") == home / "x.gif"
    Image.new("L", (2, 2)).save(home / "map.png")
    assert SEMANTIC.decode_file(path.replace("x", "map.png")).size == (2, 2)


def _models(path: str, home: Path) -> None:
    model = tiny_model("none")
    assert Pipeline(model).save_pretrained(path) == home / "x" / "model.safetensors"
    assert load(path).fingerprint == load(f"{path}/model.safetensors").fingerprint
    assert load(path, vae=path).config == model.config


def _loras(path: str, home: Path) -> None:
    model = tiny_model()
    adapter = new_lora(model)
    assert write_lora(f"{path}.safetensors", adapter, model) == home / "x.safetensors"
    assert read_lora(f"{path}.safetensors", model).layers.keys() == adapter.layers.keys()
    assert SamplingSettings(lora_folder=path.removesuffix("/x")).lora_folder == home
    save_file({"emb_params": torch.zeros(1, 16)}, home / "x.safetensors")
    assert Pipeline(model).load_textual_inversion(f"{path}.safetensors", "<x>") == ["<x>"]


def _clips(path: str, home: Path) -> None:
    from ldm.clip.model import CLIPConfig

    clip = from_dict(CLIPConfig, EXPERIMENT["clip"]["model"]).build()
    save_clip(clip, TOKENIZER, path, "transformers")
    assert load_clip(path)[0].config.embed_dim == 16
    assert (home / "x").is_dir()


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("check", [_shards, _images, _models, _loras, _clips])
def test_functions_expand_paths(home: Path, check: Callable[[str, Path], None], spelling: str) -> None:
    check(spelling.format("x"), home)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_commands_expand_paths(home: Path, spelling: str) -> None:
    from typer.testing import CliRunner

    app, received = new_app(), []

    @app.command()
    def cook(source: Path, out: Path | None = None, image: list[Path] | None = None, prompt: str = "") -> None:
        received.extend([source, out, image, prompt])

    path = spelling.format("x")
    result = CliRunner().invoke(app, [path, f"--out={path}", "--image", path, "--image", "y", "--prompt", path])
    assert result.exit_code == 0, result.output
    assert received == [home / "x", home / "x", [home / "x", Path("y")], path]
