from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import Pipeline
from ldm.diffusion import SAMPLERS, SPECS, Guidance, Projection, Step, seeded_noise, timesteps
from ldm.errors import MissingExtraError, SamplingError
from ldm.image_output import Images
from ldm.pipeline import _shipped
from tests.tiny import CAPTIONS, CHANNELS, FACTOR, SIZE, tiny_model

LATENT = (CHANNELS, SIZE // FACTOR, SIZE // FACTOR)


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny_model())


def difference(a: Any, b: Any) -> int:
    """The greatest of two images, in levels of 255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_noise_of_an_image_is_bitwise_the_same_in_any_batch(pipe: Pipeline, sampler: str) -> None:
    """A network that answers 0 leaves a function of the noise alone, pixel by pixel."""
    torch.nn.init.zeros_(pipe.model.denoiser.conv_out.weight)
    torch.nn.init.zeros_(pipe.model.denoiser.conv_out.bias)
    options: dict[str, Any] = {"sampler": sampler, "output_type": "latent", "progress": False}
    alone = pipe("a red car", seed=7, **options)[0]
    batch = pipe(CAPTIONS, seed=[1, 2, 7, 3, 4, 7], **options)
    in_parts = pipe(CAPTIONS, seed=5, batch_size=4, **options)
    assert torch.equal(batch[2], alone)
    assert torch.equal(batch[5], alone)
    assert torch.equal(in_parts[2], alone)
    assert not torch.isclose(batch[1], alone).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_pixels_of_an_image_are_the_same_in_any_batch(pipe: Pipeline, sampler: str) -> None:
    alone = pipe("a red car", seed=7, sampler=sampler, progress=False)[0]
    batch = pipe(CAPTIONS, seed=5, sampler=sampler, progress=False)
    in_parts = pipe(CAPTIONS, seed=5, sampler=sampler, batch_size=2, progress=False)
    assert difference(batch[2], alone) <= 1
    assert difference(in_parts[2], alone) <= 1
    assert difference(batch[1], alone) > 20


def test_one_seed_stands_for_itself_and_its_successors(pipe: Pipeline) -> None:
    images = pipe(["a red apple", "a blue car"], seed=5, num_images_per_prompt=2, progress=False)
    assert images.seeds == [5, 6, 7, 8]
    assert images.prompts == ["a red apple", "a red apple", "a blue car", "a blue car"]
    assert difference(images[2], pipe("a blue car", seed=7, progress=False)[0]) <= 1


def test_a_seed_drawn_at_random_is_reported_and_gives_the_image_again(pipe: Pipeline) -> None:
    first, second = (pipe("a red apple", num_images_per_prompt=2, progress=False) for _ in range(2))
    assert first.seeds[1] == first.seeds[0] + 1
    assert first.seeds != second.seeds
    again = pipe("a red apple", seed=first.seeds[1], progress=False)
    assert difference(again[0], first[1]) <= 1


def test_each_image_has_and_records_its_own_guidance_scale(pipe: Pipeline) -> None:
    both = pipe(["a red apple", "a blue car"], guidance_scale=[1.0, 4.0], seed=5, progress=False)
    for index, (prompt, scale) in enumerate((("a red apple", 1.0), ("a blue car", 4.0))):
        assert json.loads(both[index].info["settings"])["guidance_scale"] == scale
        alone = pipe(prompt, guidance_scale=scale, seed=5 + index, progress=False)
        assert difference(both[index], alone[0]) <= 1


def test_a_brownian_path_without_torchsde_names_the_extra(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(MissingExtraError, match=r"torchsde.*pip install 'ldm\[sde\]'"):
        pipe("a red apple", sampler="dpmpp_2m_sde", progress=False)
    pipe("a red apple", sampler="dpmpp_2m_sde", eta=0.0, progress=False)


def test_no_number_is_drawn_from_the_global_generator(pipe: Pipeline) -> None:
    state = torch.get_rng_state()
    pipe("a red apple", sampler="ddpm", progress=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", ["euler", "ddpm"])
def test_latents_stand_for_the_starting_noise_alone(pipe: Pipeline, sampler: str) -> None:
    options: dict[str, Any] = {"sampler": sampler, "output_type": "latent", "progress": False}
    noise = seeded_noise([5, 6], LATENT)(float("inf"), 1.0)
    drawn = pipe(["a red apple", "a blue car"], seed=5, **options)
    given = pipe(["a red apple", "a blue car"], seed=5, latents=noise, **options)
    assert torch.equal(given, drawn)
    other = pipe(["a red apple", "a blue car"], seed=5, latents=noise.flip(0), **options)
    assert not torch.allclose(other, drawn)


def test_timesteps_and_sigmas_stand_for_the_grid(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"seed": 1, "output_type": "latent", "progress": False}
    grid = timesteps(pipe.model.diffusion.schedule, 7, "trailing")
    expected = pipe("a red apple", num_inference_steps=7, **options)
    assert torch.equal(pipe("a red apple", timesteps=grid.tolist(), **options), expected)
    levels = pipe.noise_levels(timesteps=grid)
    torch.testing.assert_close(pipe("a red apple", sigmas=levels[:-1].tolist(), **options), expected)


def test_a_sampler_walks_along_the_timesteps_of_its_family() -> None:
    pipe = Pipeline(tiny_model("none", sampling={"spacing": "leading", "offset": 1}))
    schedule = pipe.model.diffusion.schedule
    starts = {sampler: pipe.noise_levels(7, sampler=sampler)[0] for sampler in ("euler", "ddim", "dpmpp_2m", "unipc")}
    for sampler, t in {"euler": 853, "ddim": 853, "dpmpp_2m": 876, "unipc": 876}.items():
        torch.testing.assert_close(starts[sampler], schedule.sigma(torch.tensor(float(t))))
    with pytest.raises(SamplingError, match="did you mean 'euler'"):
        pipe.noise_levels(7, sampler="eular")


def test_the_final_level_is_of_the_models_own_sampler_ddim_and_plms() -> None:
    pipe = Pipeline(tiny_model("none", sampling={"sampler": "deis", "final": "sigma_min", "num_inference_steps": 5}))
    sigma_min = np.float32(pipe.model.diffusion.schedule.sigma_min)
    for ways in ({}, {"timesteps": [900, 500, 100]}):
        ends = {sampler: pipe.noise_levels(sampler=sampler, **ways)[-1] for sampler in SPECS}
        assert {sampler for sampler, end in ends.items() if end == sigma_min} == {"deis", "ddim", "plms"}
        assert {float(end) for end in ends.values()} == {0.0, float(sigma_min)}
        assert pipe.noise_levels(**ways)[-1] == sigma_min
    assert pipe.noise_levels(sigmas=[9.0, 1.0])[-1] == 0


def test_the_record_of_a_png_reproduces_its_image(pipe: Pipeline, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path), device="cpu", dtype=torch.float32)
    options: dict[str, Any] = {"sampler": "ddim", "eta": 0.5, "sigmas": [9.0, 3.0, 1.0], "height": 20}
    images = pipe(["a red apple", "pomme 🍎"], "a blue car", seed=3, progress=False, **options)
    images.save(tmp_path / "{seed}.png")
    read = Image.open(tmp_path / "4.png")
    assert read.info == images[1].info
    assert read.info["prompt"] == "pomme 🍎"
    assert read.info["model"] == pipe.model.fingerprint
    settings = json.loads(read.info["settings"])
    assert settings.pop("dtype") == "float32"
    assert settings.pop("num_inference_steps") == 3
    prompts, seed = (read.info["prompt"], read.info["negative_prompt"]), int(read.info["seed"])
    assert difference(pipe(*prompts, seed=seed, progress=False, **settings)[0], read) <= 1


def test_an_image_saved_by_pillow_keeps_its_record(pipe: Pipeline) -> None:
    image = pipe("a red apple", seed=3, progress=False)[0]
    file = io.BytesIO()
    image.save(file, "PNG")
    assert Image.open(file).info == image.info


def test_save_writes_a_grid_a_pattern_or_a_folder(pipe: Pipeline, tmp_path: Path) -> None:
    images = pipe(["a red apple", "a blue car", "a sky"], seed=8, progress=False)
    (grid,) = images.save(tmp_path / "all.png")
    with Image.open(grid) as sheet:
        assert json.loads(sheet.info["prompt"]) == images.prompts
        assert json.loads(sheet.info["seed"]) == ["8", "9", "10"]
        assert np.asarray(sheet.crop((4, 4, 4 + SIZE, 4 + SIZE))).tolist() == np.asarray(images[0]).tolist()
    assert [file.name for file in images.save(tmp_path / "new")] == ["0000.png", "0001.png", "0002.png"]
    assert [file.name for file in images.save(tmp_path / "{index}-{seed}.webp")] == [
        "0-8.webp",
        "1-9.webp",
        "2-10.webp",
    ]
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".")]
    with pytest.raises(SamplingError, match="one name"):
        Images([images[0], images[0]]).save(tmp_path / "{seed}.png")
    with pytest.raises(SamplingError, match=r"'\.pgn', which is no image format"):
        images.save(tmp_path / "all.pgn")
    with pytest.raises(SamplingError, match="cannot be written"):
        images.save(grid / "below-a-file.png")


def test_a_grid_has_a_cell_for_each_image_and_its_caption(pipe: Pipeline) -> None:
    images = pipe(CAPTIONS[:5], seed=1, progress=False)
    assert images.grid(columns=2).size == (2 * SIZE + 12, 3 * SIZE + 16)
    assert images.grid().size == (3 * SIZE + 16, 2 * SIZE + 12)
    small, captioned = images.grid(columns=5, scale=3), images.grid(columns=5, scale=3, captions=True)
    ink = np.asarray(captioned.convert("L"))[3 * SIZE + 8 :]
    assert captioned.height > small.height
    assert (ink < 100).any()
    with pytest.raises(SamplingError, match="2 captions do not fit 5 images"):
        images.grid(captions=["one", "two"])
    wide = np.asarray(Images(images[:2]).grid(columns=2, captions=["W" * 20] * 2))
    assert wide[:, wide.shape[1] // 2].min() == 255, "the captions touch"


def test_a_saved_model_makes_the_same_images(pipe: Pipeline, tmp_path: Path) -> None:
    expected = pipe("a red apple", seed=1, output_type="latent", progress=False)
    file = pipe.save_pretrained(tmp_path / "run")
    loaded = Pipeline.from_pretrained(tmp_path / "run", device="cpu", dtype=torch.float32)
    actual = loaded("a red apple", seed=1, output_type="latent", progress=False)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # channels_last sums in another order
    assert loaded.model.config == pipe.model.config
    weights = pipe.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    assert Pipeline.from_pretrained(file).model.fingerprint == loaded.model.fingerprint


def test_only_networks_compute_in_low_precision(pipe: Pipeline) -> None:
    expected = pipe("a red apple", seed=1, output_type="pt", progress=False)
    seen = []
    pipe.to(dtype=torch.bfloat16).model.denoiser.register_forward_hook(
        lambda module, args, out: seen.append(tuple(t.dtype for t in (*args[:2], args[2].context, out)))
    )
    latents = pipe("a red apple", seed=1, output_type="latent", progress=False)
    low = torch.bfloat16
    assert set(seen) == {(low, torch.float32, low, low)}
    assert latents.dtype == pipe.model.first_stage.latent_std.dtype == torch.float32
    actual = pipe("a red apple", seed=1, output_type="pt", progress=False)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (3.0, 2)])
def test_guidance_is_one_call_of_the_network(pipe: Pipeline, scale: float, passes: int) -> None:
    rows: list[int] = []
    pipe.model.denoiser.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    pipe(CAPTIONS[:3], guidance_scale=scale, num_inference_steps=5, sampler="euler", progress=False)
    assert rows == [3 * passes] * 5


def test_the_negative_prompt_takes_the_place_of_the_empty_one(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"seed": 1, "progress": False, "output_type": "pt"}
    plain = pipe("a red apple", **options)
    torch.testing.assert_close(pipe("a red apple", "", **options), plain)
    assert not torch.allclose(pipe("a red apple", "a blue car", **options), plain, atol=0.01)
    unguided = pipe("a red apple", guidance_scale=1, **options)
    torch.testing.assert_close(pipe("a red apple", "a red apple", **options), unguided, atol=1e-4, rtol=0)


def test_models_of_labels_and_of_nothing() -> None:
    classes = Pipeline(tiny_model("class"))
    images = classes(label=[2, 0], seed=1, num_images_per_prompt=2, progress=False)
    assert images.prompts == ["2", "2", "0", "0"]
    assert difference(classes(label=0, seed=3, progress=False)[0], images[2]) <= 1
    assert difference(classes(label=1, seed=3, progress=False)[0], images[2]) > 1
    images = Pipeline(tiny_model("none"))(seed=1, num_images_per_prompt=3, progress=False)
    assert [image.size for image in images] == [(SIZE, SIZE)] * 3
    assert "prompt" not in images[0].info


def test_points_and_grey_images() -> None:
    points = tiny_model(
        "none",
        first_stage={"kind": "identity", "image_channels": 2},
        denoiser={"kind": "mlp"},
        diffusion={"schedule": {"kind": "sigmoid", "num_timesteps": 100}, "parametrization": "eps"},
        size=[1, 1],
    )
    drawn = Pipeline(points)(num_images_per_prompt=50, output_type="latent", progress=False)
    assert drawn.shape == (50, 2, 1, 1)
    with pytest.raises(SamplingError, match="data of 2 channels are no images"):
        Pipeline(points)()
    network = {"kind": "unet", "levels": [{"width": 8, "blocks": 1}], "heads": 1, "groups": 4}
    grey = tiny_model(
        "none",
        first_stage={"kind": "identity", "image_channels": 1},
        denoiser=network | {"in_channels": 1, "out_channels": 1, "middle_depth": 0},
    )
    assert Pipeline(grey)(progress=False)[0].mode == "L"


def test_output_types_agree(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"seed": 1, "height": 20, "width": 12, "progress": False}
    tensor = pipe("a red apple", output_type="pt", **options)
    assert tensor.shape == (1, 3, 20, 12)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    array = pipe("a red apple", output_type="np", **options)
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    image = pipe("a red apple", **options)[0]
    assert np.abs(np.asarray(image) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    latents = pipe("a red apple", output_type="latent", **options)
    assert torch.allclose((pipe.model.decode(latents) + 1) / 2, tensor, atol=1e-5)
    latents.requires_grad_().square().sum().backward()  # an ordinary tensor, out of inference mode


def test_the_callback_sees_every_step_and_can_end_the_sampling(pipe: Pipeline) -> None:
    steps: list[Step] = []
    pipe(CAPTIONS[:3], seed=1, num_inference_steps=4, batch_size=2, callback=steps.append, progress=False)
    expected = [(index, size) for size in (2, 1) for index in range(4)]
    assert [(step.index, len(step.x)) for step in steps] == expected

    def stop(step: Step) -> None:
        if step.index == 2:
            raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        pipe("a red apple", callback=stop, progress=False)


def test_the_progress_bar_counts_steps_and_can_be_turned_off(
    pipe: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(CAPTIONS[:4], num_inference_steps=3, batch_size=2)
    assert "6/6" in capsys.readouterr().err
    pipe("a red apple", progress=False)
    assert capsys.readouterr().err == ""


def test_dropout_is_off(pipe: Pipeline) -> None:
    model = tiny_model()
    model.train()
    assert not any(module.training for module in Pipeline(model).model.modules())


def test_one_line_samples_from_the_shipped_model_loaded_once(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.formats.ASSETS", tmp_path)
    _shipped.cache_clear()
    file = pipe.save_pretrained(tmp_path)
    images = Pipeline("a red apple", seed=1, progress=False)
    assert isinstance(images, Images)
    file.unlink()
    again = Pipeline(["a red apple"], seed=1, progress=False)
    assert difference(images[0], again[0]) == 0
    with pytest.raises(SamplingError, match="must be a string"):
        Pipeline(3)
    _shipped.cache_clear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": None}, r"this model needs a prompt; give one or several\."),
        ({"prompt": 3}, r"prompt 0 is 3; it must be a string\."),
        ({"prompt": ["a", None]}, r"prompt 1 is None; it must be a string\."),
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"negative_prompt": 3}, "negative_prompt 0 is 3; it must be a string"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts do not fit 1 prompts"),
        ({"label": 1}, "this model reads no label; give a prompt"),
        ({"height": 17}, "the height 17 is not divisible by 2, the factor of this model; try 16"),
        ({"width": 0}, "width is 0; it must be a whole number, 1 or more"),
        ({"sampler": "eular"}, "unknown sampler 'eular'; did you mean 'euler'"),
        ({"output_type": "pill"}, "unknown output_type 'pill'; did you mean 'pil'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_inference_steps": 1001}, "1001 steps"),
        ({"num_inference_steps": 4, "sigmas": [1.0]}, "give only one of"),
        ({"timesteps": [1, 2]}, r"timesteps \[1, 2\] do not fit the schedule"),
        ({"sigmas": []}, r"sigmas \[\] do not fit the schedule"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": [1, 2]}, "2 seeds do not fit 1 images"),
        ({"seed": -1}, "the seed -1 is no whole number"),
        ({"seed": 1.5}, "the seed 1.5 is no whole number"),
        ({"sampler": "heun", "eta": 0.5}, "the sampler heun takes no eta"),
        ({"sampler": "ddim", "eta": 1.5}, "eta is 1.5"),
        ({"sampler": "unipc", "sampler_options": {"order": 0}}, "order is 0; it must be a whole number, 1 or more"),
        ({"sampler": "ddpm", "sampler_options": {"variance": "smal"}}, "variance is 'smal'; it must be small or large"),
        ({"sampler": "dpm_adaptive", "sampler_options": {"rtol": 0}}, "rtol is 0; it must be above 0"),
        (
            {"sampler": "dpm_adaptive", "guidance": Guidance(2.0, projection=Projection(momentum=-0.5))},
            "repeats steps, which momentum would count twice",
        ),
        ({"guidance_scale": 2.0, "guidance": Guidance(2.0)}, "not both"),
        ({"guidance_scale": [2.0, 3.0]}, "2 guidance scales do not fit 1 prompts"),
        ({"spacing": "karas"}, "unknown spacing 'karas'; did you mean 'karras'"),
        ({"spacing": "karras", "sigmas": [1.0]}, "leave spacing and shift out"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"\[1, 4, 8, 9\]; these images need \[1, 4, 8, 8\]"),
    ],
)
def test_invalid_settings_are_reported_in_a_sentence(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "a red apple"} | settings), progress=False)


def test_settings_that_other_models_do_not_support() -> None:
    classes, nothing = Pipeline(tiny_model("class")), Pipeline(tiny_model("none"))
    with pytest.raises(SamplingError, match="this model reads no prompt; give a label"):
        classes("a red apple")
    with pytest.raises(SamplingError, match="this model needs a label"):
        classes()
    with pytest.raises(SamplingError, match="label 3 is not one of the 3 classes"):
        classes(label=3, progress=False)
    with pytest.raises(SamplingError, match=r"label is \['a'\]"):
        classes(label=["a"])
    with pytest.raises(SamplingError, match="leave negative_prompt out"):
        classes(negative_prompt="a", label=1)
    with pytest.raises(SamplingError, match="this model reads no prompt; leave it out"):
        nothing("a red apple")
    with pytest.raises(SamplingError, match="the device cuda:99 cannot be used"):
        nothing.to("cuda:99")
    with pytest.raises(SamplingError, match="the device gpu cannot be used"):
        nothing.to("gpu")


def test_convolutions_are_laid_out_unless_they_are_being_trained() -> None:
    """An optimizer's moments lie in memory as the parameters did when it began."""
    for trained in (True, False):
        model = tiny_model().requires_grad_(trained)
        Pipeline(model)("a red car", seed=1, output_type="pt", progress=False)
        kernels = [each for each in model.denoiser.parameters() if each.ndim == 4 and min(each.shape) > 1]
        assert kernels
        assert all(each.is_contiguous(memory_format=torch.channels_last) != trained for each in kernels)
        assert all(each.is_contiguous() == trained for each in kernels)
