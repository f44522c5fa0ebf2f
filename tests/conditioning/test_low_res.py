from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm import Pipeline, editing
from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.config import from_dict
from ldm.errors import ConfigError, DataError, SamplingError
from ldm.image_output import Images
from ldm.training.stages import train_stage
from tests.conditioning.training import WIDTH, experiment_on, trained_on
from tests.tiny import FACTOR, tiny_model

QUIET: dict[str, Any] = {"progress": False}


def config(**changes: Any) -> dict[str, Any]:
    return {"kind": "low_res", "factor": 4, "latent_factor": 1, "width": WIDTH} | changes


def low_res(**changes: Any) -> Conditioner:
    return from_dict(ConditionerConfig, config(**changes)).build()


def pictures(n: int = 2, side: int = 8) -> Tensor:
    return torch.rand(n, 3, side, side) * 2 - 1


def levels(vector: Tensor) -> Tensor:
    """The noise levels that vectors tell, by the slowest of their sines."""
    slowest = 10_000 ** (1 - 2 / vector.shape[1])
    return vector[:, -1].asin() * slowest / 1000


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The record


def test_without_noise_the_concat_is_the_small_picture_of_the_latents_size() -> None:
    small = pictures()
    cond = low_res(latent_factor=4)({"low_res": small})
    torch.testing.assert_close(cond.concat, small, rtol=0, atol=1e-6)
    assert torch.equal(levels(cond.vector), torch.zeros(2))
    for latent_factor in (1, 2, 8):
        concat = low_res(latent_factor=latent_factor)({"low_res": small}).concat
        side = 8 * 4 // latent_factor
        enlarged = [
            np.asarray(Image.fromarray(channel.numpy()).resize((side, side), Image.Resampling.BICUBIC))
            for channel in small.flatten(0, 1)
        ]
        torch.testing.assert_close(concat.flatten(0, 1), torch.from_numpy(np.stack(enlarged)), rtol=0, atol=1e-5)


def test_in_training_the_noise_is_as_strong_as_the_vector_tells() -> None:
    n, conditioner = 200, low_res(latent_factor=4, noise_max=0.5)
    of_nothing = conditioner({"low_res": torch.zeros(n, 3, 32, 32)}, drawn())
    told, found = levels(of_nothing.vector), of_nothing.concat.flatten(1).std(1)
    torch.testing.assert_close(told, found, rtol=0.08, atol=1e-6)
    uniform = torch.linspace(0, 0.5, n)
    assert (told.sort().values - uniform).abs().max() < 0.5 * 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov, 1 %


def test_the_noise_keeps_the_variance() -> None:
    cond = low_res(latent_factor=4, noise_max=1.0)({"low_res": torch.randn(100, 3, 32, 32)}, drawn())
    assert levels(cond.vector).max() > 0.9
    torch.testing.assert_close(cond.concat.flatten(1).std(1), torch.ones(100), rtol=0, atol=0.08)


def test_noise_in_training_comes_from_the_generator_and_in_sampling_from_nothing_but_the_size() -> None:
    conditioner, small = low_res(noise=0.3), pictures(3)
    first, again, other = (conditioner({"low_res": small}, drawn(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.concat, again.concat)
    assert not torch.equal(first.concat, other.concat)
    batch = conditioner({"low_res": small})
    torch.testing.assert_close(levels(batch.vector), torch.full((3,), 0.3))
    for row in range(3):
        alone = conditioner({"low_res": small[row : row + 1]})
        torch.testing.assert_close(alone.concat, batch.concat[row : row + 1])
    assert (batch.concat - low_res()({"low_res": small}).concat).abs().mean() > 0.05


def test_the_unconditional_pass_sees_the_small_picture_too() -> None:
    conditioner, small = low_res(noise=0.2), pictures()
    conditional, unconditional = conditioner({"low_res": small}), conditioner.unconditional({"low_res": small})
    assert torch.equal(conditional.concat, unconditional.concat)
    assert torch.equal(conditional.vector, unconditional.vector)


def test_a_small_picture_is_a_picture_a_file_or_a_tensor(tmp_path: Path) -> None:
    picture = Images.of((pictures(1) + 1) / 2)[0]
    picture.save(tmp_path / "small.png")
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    forms = [picture, tmp_path / "small.png", str(tmp_path / "small.png"), tensor]
    concat = low_res(latent_factor=4)({"low_res": forms}).concat
    torch.testing.assert_close(concat, tensor.expand(4, -1, -1, -1), rtol=0, atol=1e-5)


def test_training_averages_over_squares_of_pixels() -> None:
    image = pictures(2, 16)
    batch = low_res().prepare_batch({"image": image, "text": ["a", "b"]}, lambda x: x, drawn())
    torch.testing.assert_close(batch["low_res"], image.reshape(2, 3, 4, 4, 4, 4).mean((3, 5)))
    assert batch["image"] is image
    assert batch["text"] == ["a", "b"]


# What cannot be


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([None], r"enlarges images; give condition=\{'low_res'"),
        ([torch.zeros(8, 8)], r"is \[3, h, w\] in \[-1, 1\], not \[8, 8\]"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 4)], "of one size, but they are 8 x 8, 4 x 8"),
        ([3], "not int"),
    ],
)
def test_what_is_no_small_picture_is_told_in_a_sentence(given: list[Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        low_res()({"low_res": given})


def test_training_needs_pictures_that_can_be_divided() -> None:
    with pytest.raises(DataError, match=r"cached latents do not contain; set data\.cache_latents to false"):
        low_res().prepare_batch({"mean": torch.zeros(1), "std": torch.zeros(1)}, lambda x: x, drawn())
    with pytest.raises(DataError, match=r"10 x 10 are not divisible by the factor 4 .*; set data\.size"):
        low_res().prepare_batch({"image": pictures(1, 10)}, lambda x: x, drawn())


@pytest.mark.parametrize(
    "changes", [{"factor": 1}, {"latent_factor": 0}, {"noise": 0.6}, {"noise_max": 1.5}, {"noise": -0.1}, {"width": 3}]
)
def test_impossible_conditioners_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        low_res(**changes)


# The model


def tiny_upscaler(**changes: Any) -> Pipeline:
    """Enlarges four times, with latents of factor 2, untrained."""
    model = {"kind": "unet", "levels": [{"width": 16, "blocks": 1}], "heads": 2, "groups": 4}
    denoiser = model | {"in_channels": 7, "vector_width": WIDTH, "middle_depth": 0}
    return Pipeline(tiny_model("none", conditioner=config(latent_factor=FACTOR) | changes, denoiser=denoiser))


def test_the_factor_of_the_first_stage_must_be_as_counted_on() -> None:
    with pytest.raises(ConfigError, match="conditioner's latent_factor is 4, but the first stage's is 2; set it"):
        tiny_upscaler(latent_factor=4)


def test_upscale_makes_pictures_larger_by_the_factor_one_by_one_or_together() -> None:
    pipe, small = tiny_upscaler(), Images.of(torch.rand(2, 3, 6, 10))
    large = editing.upscale(pipe, list(small), seed=[5, 6], **QUIET)
    assert [picture.size for picture in large] == [(40, 24)] * 2
    alone = editing.upscale(pipe, small[1], seed=6, **QUIET)[0]
    assert np.abs(np.asarray(large[1], int) - np.asarray(alone, int)).max() <= 1
    assert len(editing.upscale(pipe, small[0], num_images_per_prompt=3, **QUIET)) == 3
    assert np.array_equal(
        np.asarray(alone), np.asarray(editing.upscale(pipe, small[1], seed=6, guidance_scale=4.0, **QUIET)[0])
    )


def test_upscaling_runs_in_low_precision() -> None:
    pipe, small = tiny_upscaler(noise=0.1), Images.of(torch.rand(1, 3, 4, 4))[0]
    exact = editing.upscale(pipe, small, seed=1, output_type="pt", **QUIET)
    low = editing.upscale(pipe.to(dtype=torch.bfloat16), small, seed=1, output_type="pt", **QUIET)
    assert 0 < (low - exact).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: editing.upscale(Pipeline(tiny_model()), Image.new("RGB", (4, 4))), "this model enlarges no images"),
        (lambda: editing.upscale(tiny_upscaler(), Image.new("RGB", (4, 4)), height=32), "leave height and width out"),
        (lambda: editing.upscale(tiny_upscaler(), []), "the list of images is empty"),
        (
            lambda: tiny_upscaler()(condition={"low_res": [torch.zeros(3, 8, 8)]}, **QUIET),
            "has the size 16 x 16 in latents, but the image 8 x 8; give the height and width",
        ),
        (lambda: tiny_upscaler()(**QUIET), r"this model needs condition=\{'low_res'"),
    ],
)
def test_what_cannot_be_upscaled_is_told_in_a_sentence(task: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        task()


@pytest.fixture(scope="module")
def patchwork() -> list[np.ndarray]:
    """96 images of 16 pixels: four by four patches of random colours, each with a brighter middle."""
    patches = np.random.default_rng(0).integers(0, 200, (96, 4, 4, 3), np.uint8)
    whole = patches.repeat(4, axis=1).repeat(4, axis=2)
    middle = np.tile([0, 1, 1, 0], 4)
    return list(whole + 50 * np.outer(middle, middle).astype(np.uint8)[..., None])


@pytest.mark.slow
def test_the_small_picture_steers_the_sample(tmp_path: Path, patchwork: list[np.ndarray]) -> None:
    """A sample for new small images shrinks to them, in all places and colours, and has details that they lack."""
    pipe = trained_on(tmp_path, patchwork[:64], config(noise_max=0.2), max_steps=200)
    truth = torch.from_numpy(np.stack(patchwork[64:])).permute(0, 3, 1, 2) / 255
    small = F.avg_pool2d(truth, 4)
    made = editing.upscale(pipe, list(Images.of(small)), seed=0, output_type="pt", **QUIET)
    shrunk = F.avg_pool2d(made, 4)
    assert correlation(shrunk, small) > 0.93
    assert abs(correlation(shrunk.roll(1, 0), small)) < 0.2
    assert correlation(made - enlarged(shrunk), truth - enlarged(small)) > 0.7


def test_training_shows_small_pictures_samples_and_the_truth(tmp_path: Path, patchwork: list[np.ndarray]) -> None:
    large = [picture.repeat(4, axis=0).repeat(4, axis=1) for picture in patchwork[:8]]
    train_stage(experiment_on(tmp_path, large, config(), max_steps=1), "denoiser")
    grid = np.asarray(Image.open(tmp_path / "run" / "denoiser" / "images" / "samples_0000001.png"))
    assert grid.shape == (4 + 3 * 68, 4 + 8 * 68, 3)
    small, _, truth = grid[4:, 4:].reshape(3, 68, 8, 68, 3)[:, :64, :, :64].swapaxes(1, 2)
    assert np.array_equal(truth, np.stack(large))
    mean = truth.reshape(8, 16, 4, 16, 4, 3).mean((2, 4)).repeat(4, axis=1).repeat(4, axis=2)
    assert np.abs(small - mean).max() <= 1


def enlarged(pictures: Tensor) -> Tensor:
    return F.interpolate(pictures, scale_factor=4)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
