from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import Pipeline
from ldm.cli.common import new_app, run
from ldm.cli.sample import DEMO_PROMPTS, main
from ldm.data.shards import EMOJI, Shards, find_shards
from ldm.diffusion import SAMPLERS, SPACINGS
from tests.tiny import tiny_lora, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Pipeline(tiny_model()).save_pretrained(folder)
    return folder


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def sample(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code


def test_the_command_writes_an_image(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "apple.png"
    done = python("tools/sample.py", "a red apple", "--model", model, "--seed", "4", "--out", file)
    assert (done.returncode, done.stdout) == (0, f"{file}\n"), done.stderr
    with Image.open(file) as image:
        assert (image.info["prompt"], image.info["seed"]) == ("a red apple", "4")


def test_options_reach_the_pipeline(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--seed 4 --steps 3 --guidance 2.5 --sampler ddim --eta 0.5 --negative car --n 2"
    options += f" --height 20 --width 12 --dtype fp32 --model {model} --out {tmp_path}/{{index}}.png"
    assert sample(monkeypatch, "a", "b", *options.split()) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{index}.png") for index in range(4)]
    with Image.open(tmp_path / "3.png") as image:
        expected = Pipeline.from_pretrained(model, dtype=torch.float32)(
            "b",
            "car",
            seed=7,
            num_inference_steps=3,
            guidance_scale=2.5,
            sampler="ddim",
            eta=0.5,
            height=20,
            width=12,
            progress=False,
        )[0]
        assert image.info == expected.info
        assert image.size == (12, 20)


@pytest.mark.parametrize(
    "options",
    [
        *([f"--sampler={name}"] for name in SAMPLERS),
        *([f"--spacing={name}"] for name in SPACINGS),
        ["--sigmas=10,3,1"],
        ["--guide=rescale=0.7", "--guide=interval=[0.3,5]"],
        ["--guide=threshold=0.9"],
        ["--guide=perturbed=2"],
        ["--guidance=6", "--guide=projection.norm_threshold=5", "--guide=projection.momentum=-0.5"],
        ["--sampler=unipc", "--option=order=3"],
        ["--sampler=ddpm", "--option=variance=large"],
        ["--sampler=dpm_adaptive", "--option=rtol=0.2"],
    ],
    ids=" ".join,
)
def test_every_solver_spacing_and_guidance_is_an_option(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    file = tmp_path / "apple.png"
    assert sample(monkeypatch, "a red apple", "--seed=4", f"--model={model}", f"--out={file}", *options) == 0
    with Image.open(file) as image:
        settings = json.loads(image.info["settings"])
    for option in options[-1:]:
        name, value = option.removeprefix("--").split("=", 1)
        if name in ("sampler", "spacing"):
            assert settings[name] == value


def test_loras_are_added_with_their_scales(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    style, other, image = tmp_path / "style.safetensors", tmp_path / "other.safetensors", tmp_path / "apple.png"
    for file in (style, other):
        save_file(tiny_lora(), file)
    common = ["a red apple", "--seed=4", f"--model={model}", f"--out={image}"]
    assert sample(monkeypatch, *common, f"--lora={style}:0.8", f"--lora={other}") == 0
    with Image.open(image) as written:
        loras = json.loads(written.info["settings"])["loras"]
    assert [(lora["name"], lora["scale"]) for lora in loras] == [("other", 1.0), ("style", 0.8)]
    assert sample(monkeypatch, *common, f"--lora={tmp_path}/none.safetensors:0.8") == 2


def test_textual_inversions_and_named_loras_are_options(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tiny_lora(), tmp_path / "style.safetensors")
    save_file({"emb_params": torch.ones(2, 16)}, tmp_path / "toy.safetensors")
    image, options = tmp_path / "apple.png", ["--prompt-syntax=weighted", f"--lora-folder={tmp_path}", "--clip-skip=1"]
    options += [
        f"--textual-inversion={tmp_path}/toy.safetensors",
        f"--textual-inversion=<b>={tmp_path}/toy.safetensors",
    ]
    prompt = "a toy <lora:style:0.5> AND [red|blue] <b>"
    assert sample(monkeypatch, prompt, "--seed=4", f"--model={model}", f"--out={image}", *options) == 0
    with Image.open(image) as written:
        settings = json.loads(written.info["settings"])
    assert [each["name"] for each in settings["textual_inversions"]] == ["toy", "<b>"]
    assert [each["scale"] for each in settings["loras"]] == [0.5]
    assert settings["clip_skip"] == 1


def test_an_image_can_be_edited(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, mask, after = tmp_path / "before.png", tmp_path / "mask.png", tmp_path / "after.png"
    Image.new("RGB", (16, 16), "teal").save(before)
    Image.new("L", (16, 16), 255).save(mask)
    common = ["a red apple", "--seed=4", f"--model={model}", f"--out={after}"]
    assert sample(monkeypatch, *common, f"--image={before}", "--strength=0") == 0
    assert Image.open(after).tobytes() == Image.open(before).tobytes()
    assert sample(monkeypatch, *common, f"--image={before}", f"--mask={mask}") == 0
    painted = Image.open(after).tobytes()
    assert sample(monkeypatch, *common) == 0
    assert Image.open(after).tobytes() == painted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guide=rescal=1"], "--guide: unknown key 'rescal'; did you mean 'rescale'"),
        (["--guide=rescale=2"], "the guidance rescale is 2.0; it must be from 0 to 1"),
        (["--guide=rescale"], "'rescale' is no setting; write name=value"),
        (["--option=order=3"], "the sampler dpmpp_2m takes no order"),
        (["--sigmas=1;2"], "--sigmas is '1;2'; write decreasing numbers"),
        (["--strength=0.5"], "give --image too"),
        (["--shift=3"], "the shift 3.0 needs a flow schedule"),
    ],
    ids=str,
)
def test_invalid_settings_are_reported(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert sample(monkeypatch, "a red apple", f"--model={model}", *options) == 2
    assert message in capsys.readouterr().err


def test_prompts_can_be_weighted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {syntax: tmp_path / f"{syntax}.png" for syntax in ("plain", "weighted")}
    for syntax, file in files.items():
        options = f"--prompt-syntax {syntax} --seed 4 --steps 1 --dtype fp32 --model {model} --out {file}"
        assert sample(monkeypatch, "(a:1.5) car", *options.split()) == 0
    with Image.open(files["plain"]) as plain, Image.open(files["weighted"]) as weighted:
        assert plain.tobytes() != weighted.tobytes()
        assert "prompt_syntax" not in plain.info["settings"]
        assert '"prompt_syntax": "weighted"' in weighted.info["settings"]


def test_the_denoising_is_animated_as_well(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image, animation = tmp_path / "a.png", tmp_path / "a.gif"
    options = f"--steps 3 --model {model} --out {image} --animate {animation}"
    assert sample(monkeypatch, "a", "b", *options.split()) == 0
    assert capsys.readouterr().out.split() == [str(image), str(animation)]
    with Image.open(image) as still, Image.open(animation) as gif:
        assert gif.size == still.size
        assert gif.n_frames >= 3


def test_the_demo_prints_the_path_of_its_grid(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample(monkeypatch, "--demo", "--model", model) == 0
    assert capsys.readouterr().out == "demo.png\n"
    first = Path("demo.png").read_bytes()
    assert sample(monkeypatch, "--demo", "--model", model) == 0
    assert Path("demo.png").read_bytes() == first


def test_the_demo_classifies_its_prompts_correctly() -> None:
    shards = Shards(find_shards(EMOJI, "train"))
    trained_on = {shards.text(i) for i in range(len(shards))}
    assert sum(map(len, DEMO_PROMPTS.values())) == 8
    assert not trained_on.intersection(DEMO_PROMPTS["held out"])
    assert trained_on.issuperset(DEMO_PROMPTS["trained on"])


def test_samplers_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(monkeypatch, "--list-samplers") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["heun", "2", "2", "none"] in lines
    assert ["ddpm", "1", "1", "white", "variance"] in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--sampler", "eular"], "error: unknown sampler 'eular'; did you mean 'euler'?"),
        (["a", "--height", "15"], "error: the height 15 is not divisible by 2"),
        (["a", "--steps", "0"], "error: num_inference_steps is 0"),
        (["a", "--dtype", "bf"], "error: unknown dtype 'bf'; did you mean 'bf16'?"),
        (["a", "--device", "gpu"], "error: the device gpu cannot be used"),
        (["a", "--out", "x.pgn"], "error: x.pgn ends in '.pgn'"),
        (["a", "--animate", "x.mp4"], "error: x.mp4 is to be an animation, which is a GIF; end it in .gif."),
        (["a", "--demo"], "error: --demo has prompts of its own"),
        (["--seed", "1"], "error: this model needs a prompt"),
        (["a", "--model", "nowhere"], "error: there is no model nowhere"),
        (["a", "--stepps", "3"], "--stepps"),
        (["a", "--steps", "x"], "Invalid value for '--steps'"),
    ],
)
def test_a_mistake_is_reported_in_a_sentence(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample(monkeypatch, "--model", model, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(model: Path) -> None:
    done = python("tools/sample.py", "a", "--model", model, "--steps", "0", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "num_inference_steps is 0" in done.stderr


def test_an_interrupt_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    app = new_app()

    @app.command()
    def wait() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["wait.py"])
    with pytest.raises(SystemExit) as exit_info:
        run(app)
    assert exit_info.value.code == 130


def test_help_does_not_wait_for_torch() -> None:
    done = python("-c", "import sys, ldm.cli.sample; print('torch' in sys.modules)")
    assert done.stdout == "False\n"


def test_sampling_imports_neither_compiler_nor_training(model: Path) -> None:
    script = (
        "import sys; from ldm import Pipeline; Pipeline.from_pretrained(sys.argv[1])('a', progress=False);"
        "print(*{name.split('.')[0] for name in sys.modules}, 'torch._dynamo' in sys.modules)"
    )
    done = python("-c", script, model)
    assert done.stdout.endswith("False\n"), done.stderr
    heavy = {"lightning", "open_clip", "torchvision", "transformers", "omegaconf", "webdataset", "scipy"}
    assert not heavy.intersection(done.stdout.split())
