from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from ldm import Pipeline, editing
from ldm.cli.recipe import Recipe
from ldm.cli.sample import main
from ldm.errors import SamplingError
from ldm.image_metadata import read_record
from ldm.image_output import Images, with_record
from ldm.prompts import Blend
from tests.tiny import SIZE, tiny_lora, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Pipeline(tiny_model()).save_pretrained(tmp_path_factory.mktemp("run") / "model.safetensors")


def sample(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["tools/sample.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        ["a red 'apple'", "--negative=blue car", "--steps=1", "--guidance=2.5", "--height=20", "--width=12"],
        ["a", "--sampler=ddim", "--eta=0.5", "--spacing=karras", "--steps=2", "--dtype=bf16"],
        ["a", "--sigmas=10,3.3", "--guidance=6", "--guide=rescale=0.7", "--guide=interval=[0.3,5]"],
        ["a", "--timesteps=900,500.5", "--sampler=ddim"],
        ["a", "--sampler=dpm_adaptive", "--option=rtol=0.5", "--guide=projection.norm_threshold=5"],
        ["a", "b", "--steps=1"],
        ["a", "--n=3", "--steps=1"],
        ["[1, 2]", "--negative=", "--steps=1"],
        ["--prompt-syntax=weighted", "--clip-skip=0", "--long-prompts=cut", "--", "-a (red:1.2) apple"],
    ],
    ids=" ".join,
)
def test_the_arguments_of_a_recipe_make_the_same_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert sample(monkeypatch, f"--model={model}", "--seed=4", f"--out={first}", *arguments) == 0
    assert sample(monkeypatch, f"--model={model}", f"--out={again}", *Recipe.of(first).arguments) == 0
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_the_printed_command_and_again_make_the_same_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    first, second, third = (tmp_path / f"{name}.{ending}" for name in ("first", "second", "third"))
    assert sample(monkeypatch, "a red 'apple'", "--steps=1", f"--model={model}", f"--out={first}") == 0
    capsys.readouterr()
    assert sample(monkeypatch, f"--model={model}", f"--read={first}") == 0
    comment, line = capsys.readouterr().out.splitlines()
    assert comment == f"# fingerprint of the model: {Pipeline.from_pretrained(model).model.fingerprint}"
    python, tool, *printed = shlex.split(line)
    assert (python, tool) == ("python", "tools/sample.py")
    assert sample(monkeypatch, f"--out={second}", *printed) == 0
    assert second.read_bytes() == first.read_bytes()
    capsys.readouterr()
    assert sample(monkeypatch, f"--model={model}", f"--read={first}", "--again", f"--out={third}") == 0
    assert "equal to" in capsys.readouterr().err
    assert third.read_bytes() == first.read_bytes()


def test_given_options_replace_those_of_the_image(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    assert sample(monkeypatch, "a red apple", "--seed=4", "--steps=1", f"--model={model}", f"--out={first}") == 0
    options = ["--again", "--seed=5", f"--model={model}", f"--out={second}"]
    assert sample(monkeypatch, f"--read={first}", *options) == 0
    assert "differs from" in capsys.readouterr().err
    with Image.open(second) as image:
        assert image.info["seed"] == "5"


def test_files_that_made_the_image_are_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, mask, lora = tmp_path / "before.png", tmp_path / "mask.png", tmp_path / "style.safetensors"
    Image.effect_noise((SIZE, SIZE), 60).convert("RGB").save(before)
    Image.linear_gradient("L").resize((SIZE, SIZE)).save(mask)
    save_file(tiny_lora(), lora)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    given = [f"--image={before}", f"--mask={mask}", f"--lora={lora}:0.5", f"--model={model}"]
    assert sample(monkeypatch, "a red car", "--seed=4", "--strength=0.7", "--steps=7", f"--out={first}", *given) == 0
    capsys.readouterr()
    assert sample(monkeypatch, f"--read={first}", f"--model={model}") == 0
    printed = capsys.readouterr().out
    assert "# --lora: style with the fingerprint" in printed
    assert "--image IMAGE --mask MASK --lora LORA --seed 4" in printed
    assert sample(monkeypatch, f"--read={first}", "--again", f"--model={model}") == 2
    assert "was made with --image" in capsys.readouterr().err
    assert sample(monkeypatch, f"--read={first}", "--again", f"--out={again}", *given) == 0
    assert again.read_bytes() == first.read_bytes()


def test_another_model_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "apple.png"
    assert sample(monkeypatch, "a red apple", f"--model={model}", f"--out={file}") == 0
    other = Pipeline(tiny_model(seed=1)).save_pretrained(tmp_path / "other.safetensors")
    capsys.readouterr()
    assert sample(monkeypatch, f"--read={file}", f"--model={other}") == 0
    assert "--model MODEL" in capsys.readouterr().out
    assert sample(monkeypatch, f"--read={file}", "--again", f"--model={other}") == 2
    assert "was made by the model with the fingerprint" in capsys.readouterr().err


def test_files_without_usable_settings_are_refused_in_one_sentence(tmp_path: Path) -> None:
    pipe = Pipeline(tiny_model())
    image = pipe("a", seed=1, progress=False)[0]
    changes = {
        "latents": {"settings": json.dumps({"latents": "given"})},
        "dtype": {"settings": json.dumps({"dtype": "float8"})},
        "crop": {"settings": json.dumps({"crops_coords_top_left": [1, 2]})},
        "broken": {"settings": "{"},
        "seeds": {"seed": "[3, 5]"},
        "sheet": {"settings": json.dumps(["{}", "{}"])},
    }
    files = {}
    for name, change in changes.items():
        files[name] = tmp_path / f"{name}.png"
        Images([with_record(image.copy(), image.info | change)]).save(files[name])
    for program in ("parameters", "workflow"):
        chunks = PngInfo()
        chunks.add_text(program, "a red apple")
        files[program] = tmp_path / f"{program}.png"
        Image.new("RGB", (8, 8)).save(files[program], pnginfo=chunks)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    pipe(Blend("a", "b", 0.5), progress=False).save(tmp_path / "blend.png")
    (tmp_path / "text.png").write_text("no image")
    files |= {name: tmp_path / name for name in ("plain.jpg", "blend.png", "text.png", "missing.png")}
    for name, message in (
        ("latents", "from latents that a file does not hold"),
        ("dtype", "are damaged"),
        ("crop", "for which there is no option"),
        ("broken", "are damaged"),
        ("seeds", "whose seeds do not follow"),
        ("sheet", "with different settings"),
        ("parameters", "settings of AUTOMATIC1111"),
        ("workflow", "settings of ComfyUI"),
        ("plain.jpg", "has no settings of ldm"),
        ("blend.png", "an object of Python"),
        ("text.png", "cannot be read as an image"),
        ("missing.png", "cannot be read"),
    ):
        with pytest.raises(SamplingError, match=message):
            Recipe.of(files[name])


def test_a_watermarked_image_is_made_again_with_its_watermark(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    options = [f"--model={model}", "--height=64", "--width=64", "--steps=1", "--watermark", f"--out={first}"]
    assert sample(monkeypatch, "a", *options) == 0
    assert sample(monkeypatch, f"--read={first}", "--again", f"--model={model}", f"--out={again}") == 0
    assert again.read_bytes() == first.read_bytes()


def test_the_steps_of_an_edit_are_those_that_were_given() -> None:
    """Some of them are left out by the strength, which is recorded as well."""
    pipe = Pipeline(tiny_model())
    image = Image.new("RGB", (SIZE, SIZE))
    edited = editing.image_to_image(pipe, "a", image, 0.5, num_inference_steps=7, progress=False)[0]
    settings = json.loads(read_record(edited)["settings"])
    assert (settings["num_inference_steps"], settings["strength"]) == (7, 0.5)
