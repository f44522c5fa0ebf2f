from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import Pipeline
from ldm.config import from_dict
from ldm.data.samples import BatchIndices
from ldm.formats import load
from ldm.formats.native import save_model
from ldm.training.experiment import load_config
from ldm.vae import AutoencoderKLConfig, Identity
from ldm.vae.metrics import measure_latents
from ldm.vae.preview import LeastSquares, preview
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def numpys(latent: Tensor, colours: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias by numpy's least squares on all positions at once."""
    z, y = (each.double().movedim(1, 3).flatten(0, 2).numpy() for each in (latent, colours))
    solution = np.linalg.lstsq(np.hstack([z, np.ones_like(z[:, :1])]), y, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def test_the_fit_is_the_least_squares_solution() -> None:
    """On the means of the pixels of a position; as good for latents far from 0 as for others."""
    latent = torch.randn(6, 4, 3, 5) * torch.tensor([1.0, 20.0, 0.05, 1.0])[:, None, None]
    latent = latent + torch.tensor([0.0, 5.0, 100.0, -1.0])[:, None, None]
    image = torch.rand(6, 3, 12, 20) * 2 - 1
    fit = LeastSquares()
    for part in (slice(0, 4), slice(4, 6)):
        fit.add(latent[part], image[part])
    for actual, expected in zip(fit.solve(), numpys(latent, F.avg_pool2d(image, 4)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_of_the_solutions_for_dependent_latents_the_smallest_is_taken() -> None:
    latent = torch.randn(8, 1, 4, 4).expand(-1, 2, -1, -1)
    fit = LeastSquares()
    fit.add(latent, 3 * latent[:, :1] + 0.5)
    weight, bias = fit.solve()
    torch.testing.assert_close(weight, torch.tensor([[1.5, 1.5]]).double())
    torch.testing.assert_close(bias, torch.tensor([0.5]).double())


def test_what_is_stored_maps_normalised_latents() -> None:
    vae = from_dict(AutoencoderKLConfig, {"widths": [8, 8], "blocks": 1, "groups": 4}).build().requires_grad_(False)
    images = torch.rand(10, 3, 16, 16) * 2 - 1
    measure_latents(vae, [{"image": part} for part in images.split(4)])
    latent = vae.encode(images).mean
    weight, bias = (torch.from_numpy(each).float() for each in numpys(latent, F.avg_pool2d(images, 2)))
    expected = F.conv2d(latent, weight[..., None, None], bias)
    torch.testing.assert_close(preview(vae, vae.normalize(latent)), expected, atol=1e-5, rtol=1e-4)


def test_the_preview_of_pixels_is_the_pixels() -> None:
    latent = torch.randn(2, 3, 4, 4)
    assert torch.equal(preview(Identity(3, 1), latent), latent)


def test_a_preview_travels_with_the_file_that_has_one(tmp_path: Path) -> None:
    model, latent = tiny_model(), torch.randn(2, 4, 8, 8)
    without = save_model(tmp_path / "without.safetensors", model, {})
    assert load(tmp_path / "without.safetensors").first_stage.latent_preview is None
    model.first_stage.register_buffer("latent_preview", torch.randn(3, 5))
    fitted = save_model(tmp_path / "with.safetensors", model, {}, torch.float16)
    assert fitted != without
    loaded = load(tmp_path / "with.safetensors")
    assert torch.equal(loaded.preview(latent), model.preview(latent))
    assert loaded.preview(10 * latent).abs().max() == 1  # an image's range
    loaded.load_state_dict(load(tmp_path / "without.safetensors").state_dict())
    assert loaded.first_stage.latent_preview is None


def test_a_preview_that_is_fitted_when_needed_is_fitted_once_and_not_saved(tmp_path: Path) -> None:
    model, latent = tiny_model(), torch.randn(2, 4, 8, 8)
    before = save_model(tmp_path / "model.safetensors", model, {})
    first, fitted = model.preview(latent), model.first_stage.fitted_preview
    assert fitted is not None
    assert torch.equal(model.preview(latent), first)
    assert model.first_stage.fitted_preview is fitted
    assert torch.equal(tiny_model().preview(latent), first)  # and does not depend on chance
    assert save_model(tmp_path / "model.safetensors", model, {}) == before


def explained(estimate: Tensor, picture: Tensor) -> float:
    """R^2: the share of the image's variance that its preview explains."""
    error, spread = estimate - picture, picture - picture.mean((0, 2, 3), keepdim=True)
    return 1 - float(error.square().sum() / spread.square().sum())


def test_previews_of_the_shipped_model_look_like_its_pictures() -> None:
    """Fitted to images as training does, and fitted to random latents: the file is older than the preview."""
    model = Pipeline.from_pretrained("emoji", "cpu", torch.float32).model
    samples = load_config(ROOT / "configs" / "emoji_64.yaml").data.open("val")
    images = samples[BatchIndices(np.arange(len(samples)))]["image"]
    with torch.inference_mode():
        latents = model.encode(images[:96])
        shown = F.avg_pool2d(model.decode(latents), model.first_stage.factor)
        assert explained(model.preview(latents), shown) > 0.83  # measured: 0.869
        measure_latents(model.first_stage, [{"image": images[96:]}])
        assert explained(model.preview(model.encode(images[:96])), shown) > 0.86  # measured: 0.887
