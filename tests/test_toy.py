"""The plain DDPM of the tutorials and the real sizes of Stable Diffusion 1, both as configs."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.cli.dry_run import describe
from ldm.data.samples import BatchIndices
from ldm.errors import MissingExtraError
from ldm.model import LatentDiffusion
from ldm.pipeline import Pipeline
from ldm.training.experiment import load_config
from ldm.training.stages import build_module, train_stage
from ldm.training.toy_plots import forward_process, reverse_process

CONFIGS = Path(__file__).parents[1] / "configs"
S_CURVE, DIGITS = CONFIGS / "toy" / "s_curve.yaml", CONFIGS / "toy" / "ddpm_pixels.yaml"


def untrained(config: Path = S_CURVE) -> LatentDiffusion:
    return build_module(load_config(config), "denoiser").task.model


def to_the_nearest(points: Tensor, data: Tensor) -> float:
    """Mean distance from a point ``[n 2]`` to the nearest of the data ``[m 2]``."""
    return float(torch.cdist(points, data).amin(dim=1).mean())


@pytest.fixture(scope="module")
def curve_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shorter run of s_curve, that samples in a fifth of the steps."""
    folder = tmp_path_factory.mktemp("s_curve")
    overrides = ["max_steps=1000", "batch_size=256", "learning_rate=2e-2", "images_every=1000"]
    settings = [f"run_dir={folder}", "denoiser.sampling.num_inference_steps=20"]
    train_stage(load_config(S_CURVE, settings + [f"denoiser.train.{each}" for each in overrides]), "denoiser")
    return folder


def test_samples_lie_on_the_s(curve_run: Path) -> None:
    """Much closer to it than points of a Gaussian with its mean and covariance, and all along it."""
    data = load_config(S_CURVE).data.open("test")[BatchIndices(np.arange(5000))]["image"].flatten(1)
    samples = Pipeline.from_pretrained(curve_run)(
        num_images_per_prompt=500, seed=0, output_type="latent", progress=False
    )
    gaussian = torch.distributions.MultivariateNormal(data.mean(0), data.T.cov()).sample((500,))
    assert to_the_nearest(samples.flatten(1), data) < 0.6 * to_the_nearest(gaussian, data)
    assert to_the_nearest(data, samples.flatten(1)) < to_the_nearest(data, gaussian)


def test_the_plots_show_ten_states_of_each_process(curve_run: Path) -> None:
    for name in ("forward", "reverse"):
        picture = np.asarray(Image.open(curve_run / "denoiser" / "images" / f"{name}_0001000.png")).astype(int)
        red = picture[..., 0] - picture[..., 1] > 50
        panels = [cell for row in np.array_split(red, 2) for cell in np.array_split(row, 5, axis=1)]
        assert min(panel.sum() for panel in panels) > 500


def test_the_animation_goes_forward_then_backward(curve_run: Path) -> None:
    """21 states each way: at the end the points are back where they were at the start, but not in between."""
    with Image.open(curve_run / "denoiser" / "images" / "diffusion.gif") as gif:
        assert gif.n_frames == 2 * 21
        frames = []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    red = np.stack(frames)[..., 0] - np.stack(frames)[..., 1] > 30
    on_the_s = (red & red[0]).sum(axis=(1, 2)) / red.sum(axis=(1, 2))
    assert on_the_s[-1] > 1.5 * max(on_the_s[15:27])


def test_the_forward_process_has_the_variances_of_ddpm() -> None:
    """That of x_t is 1 - abar_t where the data are a point in the origin (Ho et al. 2006.11239, equation 4)."""
    model, n = untrained(), 20_000
    states = forward_process(model, torch.zeros(n, 2, 1, 1), torch.Generator().manual_seed(0))
    expected = torch.cat([torch.zeros(1), 1 - model.diffusion.schedule.alphas_cumprod.float()])
    assert len(states) == 101
    torch.testing.assert_close(torch.stack([state.var() for state in states]), expected, rtol=0.04, atol=0)


def test_the_reverse_process_starts_at_unit_noise_and_takes_every_timestep() -> None:
    states = reverse_process(untrained(), torch.zeros(1000, 2, 1, 1), torch.Generator().manual_seed(0))
    assert len(states) == 101
    assert states[0].mean().abs() < 0.1
    assert abs(float(states[0].std()) - 1) < 0.08


def test_without_matplotlib_the_training_of_points_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'; install it with pip install 'ldm\[toy\]'"):
        train_stage(load_config(S_CURVE, [f"run_dir={tmp_path}/run"]), "denoiser")
    assert not (tmp_path / "run").exists()


def test_digits_train_in_pixel_space_and_are_shown_one_of_each(tmp_path: Path) -> None:
    overrides = ["max_steps=30", "batch_size=32", "validate_every=15", "images_every=30"]
    settings = [f"run_dir={tmp_path}", "denoiser.sampling.num_inference_steps=5"]
    train_stage(load_config(DIGITS, settings + [f"denoiser.train.{each}" for each in overrides]), "denoiser")
    with (tmp_path / "denoiser" / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert losses[1] < 0.9 * losses[0]

    grid = np.asarray(Image.open(tmp_path / "denoiser" / "images" / "samples_0000030.png").convert("L"))
    assert min(grid.shape) > 3 * 64, "three rows of four, enlarged"
    pictures = Pipeline.from_pretrained(tmp_path)(label=range(10), seed=0, num_inference_steps=2, progress=False)
    assert [picture.info["label"] for picture in pictures] == [str(digit) for digit in range(10)]
    assert {picture.size for picture in pictures} == {(8, 8)}


@pytest.mark.slow
def test_sd1_has_the_sizes_of_stable_diffusion_1() -> None:
    """Counts of the published checkpoints."""
    experiment = load_config(CONFIGS / "sd1.yaml")
    report = describe(experiment, experiment.stages)
    for line in (
        "first stage: 83,653,863 parameters",
        "text tower: 123,650,304 parameters",
        "image tower: 303,966,208 parameters",
        "denoiser: 859,520,964 parameters",
        "the stages fit each other: latents 4 x 32 x 32",
    ):
        assert line in report
