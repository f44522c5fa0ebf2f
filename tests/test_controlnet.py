from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import Pipeline, editing
from ldm.cli.sample import main
from ldm.control_images import ControlImage
from ldm.diffusion import Guidance
from ldm.errors import CheckpointError, SamplingError
from tests.formats import world
from tests.tiny import SIZE, tiny_controlnet, tiny_model

SETTINGS: dict[str, Any] = {"seed": 5, "progress": False, "output_type": "latent", "num_inference_steps": 2}


def hint(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("controlnets")
    tiny_controlnet(root / "edges", 1)
    tiny_controlnet(root / "depth", 2)
    tiny_controlnet(root / "style", 3, global_pool=True)
    tiny_controlnet(root / "untrained", 4, is_trained=False)
    return root


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    pipe = Pipeline(tiny_model())
    for name in ("edges", "depth", "style", "untrained"):
        assert pipe.load_controlnet(folder / name) == name
    return pipe


def by(name: str = "edges", seed: int = 1, **settings: Any) -> ControlImage:
    return ControlImage(name, hint(seed), **settings)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_without_effect_the_image_is_bitwise_the_one_without(pipe: Pipeline, guidance_scale: float) -> None:
    settings = SETTINGS | {"guidance_scale": guidance_scale}
    plain = pipe(["a", "b"], **settings)
    assert torch.equal(pipe(["a", "b"], controlnets=by(scale=0), **settings), plain)
    assert torch.equal(pipe(["a", "b"], controlnets=by("untrained"), **settings), plain)
    both = [by("untrained"), by(scale=0)]
    assert torch.equal(pipe(["a", "b"], controlnets=both, **settings), plain)
    assert not torch.allclose(pipe(["a", "b"], controlnets=by(), **settings), plain)


def test_effects_of_several_add_up_and_depend_on_image_and_scale(pipe: Pipeline) -> None:
    images = {
        name: pipe("a", controlnets=controls, **SETTINGS)
        for name, controls in {
            "edges": by(),
            "other image": by(seed=2),
            "weak": by(scale=0.5),
            "depth": by("depth"),
            "both": [by(), by("depth")],
            "one twice": [by(scale=0.25), by(scale=0.25)],
        }.items()
    }
    assert torch.allclose(images["one twice"], images["weak"], atol=1e-4)
    different = [images[name] for name in images if name != "one twice"]
    assert all(not torch.allclose(a, b) for i, a in enumerate(different) for b in different[:i])


@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", pytest.param("dpm_adaptive", marks=pytest.mark.slow)]
)
def test_images_of_a_batch_have_their_own_hints(pipe: Pipeline, sampler: str) -> None:
    settings = SETTINGS | {"sampler": sampler}
    both = pipe(["a", "b"], controlnets=ControlImage("edges", [hint(1), hint(2)]), batch_size=2, **settings)
    second = pipe("b", controlnets=by(seed=2), **settings | {"seed": 6})
    assert torch.allclose(both[1], second[0], atol=1e-4)
    assert not torch.allclose(both[1], pipe("b", controlnets=by(seed=1), **settings | {"seed": 6})[0])


def test_it_acts_within_a_share_of_the_steps(pipe: Pipeline) -> None:
    """Euler, whose steps are one evaluation each: the steps of a sampling by hand have it or not."""
    model, steps = pipe.model, 4
    levels = pipe.noise_levels(steps, sampler="euler")
    settings = {"seed": 5, "progress": False, "output_type": "latent", "sampler": "euler"}
    x = pipe("a", num_inference_steps=steps, controlnets=by(start=0.25, end=0.75), **settings)

    def part(latents: Tensor, first: int, last: int, **more: Any) -> Tensor:
        x = latents
        for i in range(first, last):
            stream = pipe.stream("a", sigmas=levels[i : i + 2], edit=Start(x), **settings, **more)
            x = next(stream).x
            stream.close()
        return x

    class Start(editing.Edit):
        def __init__(self, x: Tensor):
            self.x = x

        def start(self, x: Tensor, unit: Tensor, sigma: float, rows: slice) -> Tensor:
            return self.x

    first = next(pipe.stream("a", num_inference_steps=steps, **settings)).x
    by_hand = part(part(first, 1, 3, controlnets=by()), 3, 4)
    assert torch.allclose(model.diffusion.finish(by_hand, float(levels[-1])), x, atol=1e-4)
    assert torch.equal(pipe("a", controlnets=by(end=0.1), **SETTINGS), pipe("a", **SETTINGS))


def test_a_pooled_one_acts_on_the_conditional_estimate_alone(pipe: Pipeline) -> None:
    seen = []
    original = type(pipe.model.controlnets).residuals

    def watched(self: Any, *inputs: Any) -> Any:
        seen.append(inputs[-1])
        return original(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.model.controlnets), "residuals", watched)
        pipe("a", controlnets=[by("style"), by()], **SETTINGS)
    assert [control.scale.tolist() for control in seen[0]] == [[1.0, 0.0], [1.0, 1.0]]
    plain = pipe("a", **SETTINGS)
    assert not torch.allclose(pipe("a", controlnets=by("style"), **SETTINGS), plain)


def test_composed_scheduled_and_perturbed_samplings(pipe: Pipeline) -> None:
    for prompt, more in (
        ("a red apple AND a car:0.5", {"prompt_syntax": "weighted"}),
        ("[a:b:0.5]", {"prompt_syntax": "weighted"}),
        ("a", {"guidance": Guidance(3.0, perturbed=2.0)}),
        ("a", {"cache_interval": 2}),
        ("a", {"token_merging": 0.5}),
    ):
        plain = pipe([prompt] * 2, **SETTINGS, **more)
        assert torch.equal(pipe([prompt] * 2, controlnets=by(scale=0), **SETTINGS, **more), plain)
        assert torch.equal(pipe([prompt] * 2, controlnets=by("untrained"), **SETTINGS, **more), plain)
        assert not torch.allclose(pipe([prompt] * 2, controlnets=by(), **SETTINGS, **more), plain)


def test_editing_takes_controls(pipe: Pipeline) -> None:
    image, mask = hint(7), torch.zeros(SIZE, SIZE)
    mask[:, SIZE // 2 :] = 1
    settings = SETTINGS | {"output_type": "pt"}
    changed = editing.style_transfer(pipe, image, "a car", controlnets=by(), **settings)
    assert not torch.allclose(changed, editing.style_transfer(pipe, image, "a car", **settings))
    painted = editing.inpaint(pipe, "a", image, mask, controlnets=by(), **settings)
    assert torch.equal(painted[0, :, :, : SIZE // 2], image[:, :, : SIZE // 2])
    assert not torch.allclose(painted, editing.inpaint(pipe, "a", image, mask, **settings))
    large = editing.high_resolution(pipe, "a", 2 * SIZE, 2 * SIZE, controlnets=by(), **settings)
    assert large.shape[2:] == (2 * SIZE, 2 * SIZE)


def test_copies_and_pickles_keep_them_and_a_state_dict_and_a_file_do_not(pipe: Pipeline, tmp_path: Path) -> None:
    expected = pipe("a", controlnets=by(), **SETTINGS)
    for other in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(other("a", controlnets=by(), **SETTINGS), expected)
    assert not [name for name in pipe.model.state_dict() if "controlnet" in name]
    pipe.model.load_state_dict(pipe.model.state_dict())
    assert torch.equal(pipe("a", controlnets=by(), **SETTINGS), expected)
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "model.safetensors"), dtype=torch.float32)
    assert not again.model.controlnets.loaded


def test_loading_and_unloading(folder: Path) -> None:
    pipe = Pipeline(tiny_model())
    plain = pipe("a", **SETTINGS)
    with pytest.raises(SamplingError, match="no ControlNet 'edges' is loaded into this model; load it with"):
        pipe("a", controlnets=by(), **SETTINGS)
    pipe.load_controlnet(folder / "edges")
    assert torch.equal(pipe("a", **SETTINGS), plain)
    with pytest.raises(SamplingError, match="a ControlNet 'edges' is loaded; unload it"):
        pipe.load_controlnet(folder / "edges" / "diffusion_pytorch_model.safetensors")
    pipe.load_controlnet(folder / "edges", name="other")
    with pytest.raises(SamplingError, match="unknown ControlNet 'edgse'; did you mean 'edges'"):
        pipe("a", controlnets=by("edgse"), **SETTINGS)
    stream = pipe.stream("a", controlnets=by(), **SETTINGS)
    next(stream)
    pipe.unload_controlnet("edges")
    with pytest.raises(SamplingError, match="unknown ControlNet 'edges'"):
        next(stream)
    pipe.unload_controlnet()
    assert torch.equal(pipe("a", **SETTINGS), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conditioner": {"kind": "none"}, "reads": "none"},
            "its width of the context is 16, but that of this model None",
        ),
        ({"levels": [{"width": 32, "blocks": 1, "depth": 1}]}, r"widths of the levels is \[16\]"),
        ({"levels": [{"width": 16, "blocks": 2, "depth": 1}]}, r"blocks of the levels is \[1\]"),
        ({"widths": [8, 8, 8]}, "factor between image and latent is 2, but that of this model 4"),
    ],
    ids=str,
)
def test_one_for_another_kind_of_model_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    network = {"kind": "unet", "levels": change.get("levels", [{"width": 16, "blocks": 1, "depth": 1}])}
    reads = change.get("reads", "text")
    network |= {"heads": 2, "groups": 4} | ({"context_width": 16} if reads == "text" else {})
    vae = {"kind": "autoencoder_kl", "widths": change.get("widths", [8, 8]), "blocks": 1, "groups": 4}
    pipe = Pipeline(tiny_model(reads, denoiser=network, first_stage=vae))
    with pytest.raises(CheckpointError, match=message):
        pipe.load_controlnet(folder / "edges")
    assert not pipe.model.controlnets.loaded


def test_sources_without_a_controlnet_are_refused(tmp_path: Path) -> None:
    pipe = Pipeline(tiny_model())
    with pytest.raises(CheckpointError, match="holds no controlnet, but first_stage and"):
        pipe.load_controlnet(pipe.save_pretrained(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="there is no model"):
        pipe.load_controlnet(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (lambda: ControlImage("edges", hint(1), start=0.5, end=0.5), "is 0.5 and its end 0.5; the end must be greater"),
        (lambda: ControlImage("edges", hint(1), end=1.5), "the end of the ControlNet 'edges' is 1.5"),
        (lambda: ControlImage("edges", hint(1), scale=float("nan")), "the scale of the ControlNet 'edges' is nan"),
        (lambda: ControlImage("edges", []), "the list of images of the ControlNet 'edges' is empty"),
        (lambda: ControlImage("edges", "missing.png"), "missing.png"),
        (lambda: {"edges": hint(1)}, "controlnets has an entry of type str; give ldm.control_images.ControlImage"),
        (lambda: ControlImage("edges", hint(1, (8, 32))), "32 x 8 pixels, other proportions than the 16 x 16"),
        (lambda: ControlImage("edges", [hint(1)] * 3), "3 images of the ControlNet 'edges' do not fit 2 prompts"),
    ],
)
def test_controls_that_cannot_be_are_refused_in_a_sentence(pipe: Pipeline, controls: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        pipe(["a", "b"], controlnets=controls(), **SETTINGS)


def test_a_hint_is_scaled_to_the_image(pipe: Pipeline) -> None:
    grey = torch.full((3, 4 * SIZE, 4 * SIZE), 0.25)
    small = pipe("a", controlnets=ControlImage("edges", grey[:, :SIZE, :SIZE]), **SETTINGS)
    assert torch.allclose(pipe("a", controlnets=ControlImage("edges", grey), **SETTINGS), small, atol=1e-4)


def test_the_record_names_them(pipe: Pipeline) -> None:
    settings = SETTINGS | {"output_type": "pil"}
    image = pipe("a", controlnets=[by(scale=0.5, end=0.75), by("depth")], **settings)[0]
    first, second = json.loads(image.info["settings"])["controlnets"]
    fingerprints = {name: each.fingerprint for name, each in pipe.model.controlnets.loaded.items()}
    assert first == {"name": "edges", "file": fingerprints["edges"], "scale": 0.5, "start": 0.0, "end": 0.75}
    assert second == {"name": "depth", "file": fingerprints["depth"], "scale": 1.0}
    assert "controlnets" not in json.loads(pipe("a", **settings)[0].info["settings"])


def test_low_precision_keeps_the_scale(folder: Path) -> None:
    pipe = Pipeline(tiny_model()).to(dtype=torch.bfloat16)
    pipe.load_controlnet(folder / "edges")
    (loaded,) = pipe.model.controlnets.loaded.values()
    assert loaded.network.conv_in.weight.dtype == torch.bfloat16
    full = Pipeline(tiny_model())
    full.load_controlnet(folder / "edges")
    images = [each("a", controlnets=by(scale=0.3), **SETTINGS) for each in (pipe, full)]
    assert (images[0] - images[1]).abs().mean() < 0.1
    full.to(dtype=torch.bfloat16)
    assert torch.equal(full("a", controlnets=by(scale=0.3), **SETTINGS), images[0])


def test_a_sampling_is_that_of_diffusers(tmp_path: Path) -> None:
    peer = world.pipeline("sd1")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        controlnet = diffusers.ControlNetModel.from_unet(peer.unet, conditioning_embedding_out_channels=(16, 32))
        for parameter in controlnet.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "model")
    controlnet.save_pretrained(tmp_path / "edges")
    both = diffusers.StableDiffusionControlNetPipeline(**peer.components, controlnet=controlnet.eval())
    both.set_progress_bar_config(disable=True)
    pipe = Pipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.load_controlnet(tmp_path / "edges")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    shared: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise, "output_type": "np"}
    images = []
    for scale, start, end in ((0.8, 0.0, 1.0), (1.5, 0.2, 0.8)):
        spans = {"control_guidance_start": start, "control_guidance_end": end}
        expected = both("a cat", image, controlnet_conditioning_scale=scale, **spans, **shared).images
        control = ControlImage("edges", image, scale, start, end)
        own = pipe("a cat", controlnets=control, progress=False, **shared)
        assert np.abs(own - expected).max() < 1e-3
        images.append(own)
    plain = pipe("a cat", progress=False, **shared)
    assert min(np.abs(own - plain).max() for own in images) > 0.05


def test_a_controlnet_within_the_folder_of_a_pipeline_is_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "controlnet").symlink_to(folder / "edges")
    pipe = Pipeline(tiny_model())
    assert pipe.load_controlnet(tmp_path) == "controlnet"
    assert pipe.load_controlnet(folder, subfolder="depth") == "depth"
    with pytest.raises(CheckpointError, match="has no weights of the variant 'fp16'"):
        pipe.load_controlnet(folder / "edges", variant="fp16")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "inductor"])
def test_compiled_networks_take_controls(backend: str, folder: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    pipe = Pipeline(tiny_model())
    pipe.load_controlnet(folder / "edges")
    calls: list[dict[str, Any]] = [{}, {"controlnets": by()}, {"controlnets": [by(scale=0.5, end=0.5), by(seed=2)]}]
    expected = [pipe("a", **SETTINGS, **more) for more in calls]
    options = {"cache": None} if backend == "openvino" else {}
    pipe.compile(backend, progress=False, **options)
    for more, image in zip(calls, expected, strict=True):
        assert torch.allclose(pipe("a", **SETTINGS, **more), image, atol=1e-3)
    pipe.unload_controlnet()
    assert torch.allclose(pipe("a", **SETTINGS), expected[0], atol=1e-3)


def test_the_command_takes_them_and_makes_images_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(*arguments: object) -> str:
        """What the command prints on both streams."""
        monkeypatch.setattr(sys, "argv", ["tools/sample.py", f"--model={tmp_path}", *map(str, arguments)])
        with pytest.raises(SystemExit):
            main()
        return "".join(capsys.readouterr())

    Pipeline(tiny_model()).save_pretrained(tmp_path)
    image, first, again = tmp_path / "hint.png", tmp_path / "first.png", tmp_path / "again.png"
    Image.effect_noise((SIZE, SIZE), 90).convert("RGB").save(image)
    given = [f"--controlnet=own={folder / 'edges'}", f"--controlnet={folder / 'depth'}", *[f"--control={image}"] * 2]
    scales = ["--control-scale=0.5", "--control-scale=1", "--control-span=0,0.5"]
    sample("a", "--seed=5", "--steps=2", f"--out={first}", *given, *scales)
    pipe = Pipeline.from_pretrained(tmp_path)
    for source, name in (("edges", "own"), ("depth", "depth")):
        pipe.load_controlnet(folder / source, name)
    controls = [ControlImage("own", image, 0.5, end=0.5), ControlImage("depth", image, end=0.5)]
    expected = pipe("a", controlnets=controls, **SETTINGS | {"output_type": "pil"})[0]
    with Image.open(first) as made:
        assert made.tobytes() == expected.tobytes()

    printed = sample(f"--read={first}")
    assert f"# --controlnet: own with the fingerprint {pipe.model.controlnets.named('own').fingerprint}" in printed
    assert "# --control: the image of the ControlNet depth" in printed
    assert "--controlnet CONTROLNET --control CONTROL --controlnet CONTROLNET --control CONTROL" in printed
    assert "was made with --controlnet (own with the fingerprint" in sample(f"--read={first}", "--again")
    assert "is equal to" in sample(f"--read={first}", "--again", f"--out={again}", *given)
    assert "2 --controlnet and 1 --control are given" in sample("a", *given[:3])
    assert "are about a ControlNet; give --controlnet too" in sample("a", "--control-scale=0.5")
    assert "3 --control-scale do not fit 2 --controlnet" in sample("a", *given, *["--control-scale=1"] * 3)
    assert "--control-span is '0.5'; write two shares" in sample("a", *given, "--control-span=0.5")
