"""Metrics of networks against other packages, closed forms and loops."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from scipy.stats import norm
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure

from ldm.clip.retrieval import recall_at_k
from ldm.diagnosis.pool import Pool
from ldm.evaluation.lpips import BACKBONE, lpips_network
from ldm.evaluation.metric import all_metrics
from ldm.evaluation.metrics import probe
from ldm.evaluation.metrics.contrastive import best_scale, calibration_error, classifier
from ldm.evaluation.metrics.denoising import encoded, levels_of, relative_error
from ldm.evaluation.subject import Subject
from ldm.formats import save
from ldm.vae.metrics import psnr, ssim
from tests.evaluation.subjects import numbers, opened, tiny_clip
from tests.tiny import TOKENIZER, tiny_model


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (yes|no) \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(
        (name, each.part, "yes" if each.by_default else "no") for name, each in all_metrics().items()
    )


def pairs() -> tuple[Tensor, Tensor]:
    image = torch.rand(3, 3, 32, 40) * 2 - 1
    return image, (image + 0.3 * torch.randn(image.shape)).clamp(-1, 1)


def test_psnr_is_that_of_torchmetrics() -> None:
    image, other = pairs()
    expected = peak_signal_noise_ratio(other, image, data_range=2.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(image, other), expected)


def test_ssim_is_that_of_torchmetrics_and_of_the_formula() -> None:
    image, other = pairs()
    found = ssim(image, other)
    measure = StructuralSimilarityIndexMeasure(data_range=(0.0, 1.0), reduction="none")
    torch.testing.assert_close(found, measure((other + 1) / 2, (image + 1) / 2), rtol=1e-4, atol=1e-5)

    window = norm.pdf(np.arange(-5, 6), scale=1.5)
    window /= window.sum()

    def smooth(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, window, axis=-1, mode="mirror"), window, axis=-2, mode="mirror")

    a, b = ((each.double().numpy() + 1) / 2 for each in (image, other))
    means, c1, c2 = (smooth(a), smooth(b)), 0.01**2, 0.03**2
    variances = smooth(a * a) - means[0] ** 2, smooth(b * b) - means[1] ** 2
    covariance = smooth(a * b) - means[0] * means[1]
    local = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    local /= (means[0] ** 2 + means[1] ** 2 + c1) * (variances[0] + variances[1] + c2)
    np.testing.assert_allclose(found.numpy(), local.mean(axis=(1, 2, 3)), rtol=1e-3)
    assert ssim(image[..., :10], other[..., :10]).isnan().all()
    with torch.autocast("cpu", torch.bfloat16):  # as in a validation
        assert torch.equal(ssim(image, other), found)


@pytest.mark.slow
def test_lpips_is_that_of_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With random weights of AlexNet, in torch's hub folder."""
    from lpips import LPIPS
    from torchvision.models import alexnet

    (tmp_path / "checkpoints").mkdir()
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "checkpoints" / BACKBONE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    image, other = (each.repeat(1, 1, 2, 2) for each in pairs())
    found = lpips_network(torch.device("cpu"))(image, other)
    with torch.no_grad():
        package = LPIPS(net="alex", verbose=False).eval()
        expected = [float(package(a[None], b[None])) for a, b in zip(image, other, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert lpips_network(torch.device("cpu"))(image, image).tolist() == pytest.approx([0, 0, 0])


def test_statistics_of_latents_are_those_of_all_latents(subject: Subject) -> None:
    assert subject.first_stage is not None
    stage, found = subject.first_stage, numbers(subject, "latents")
    image = torch.cat([batch["image"] for batch in subject.measured()])
    with torch.no_grad():
        posterior = stage.encode(image.to(next(stage.parameters()).dtype))
        mode = stage.normalize(posterior.mode.float()).double().transpose(0, 1).flatten(1).numpy()
        scale = stage.latent_std.double()[:, None, None]
        noise = (posterior.variance.double() / scale**2).mean((0, 2, 3)).numpy()
    total = mode.var(axis=1) + noise
    std = np.sqrt(total)
    correlation = np.corrcoef(mode)
    np.fill_diagonal(correlation, 0)
    assert found["latent_mean"].estimate.value == pytest.approx(np.abs(mode.mean(axis=1)).max(), rel=1e-4)
    assert found["latent_std_min"].estimate.value == pytest.approx(std.min(), rel=1e-4)
    assert found["latent_std_max"].estimate.value == pytest.approx(std.max(), rel=1e-4)
    assert found["latent_correlation"].estimate.value == pytest.approx(np.abs(correlation).max(), rel=1e-4)
    assert found["latent_noise"].estimate.value == pytest.approx((noise / total).mean(), rel=1e-4)


def test_the_error_of_a_denoiser_that_learned_the_scale_alone_is_1() -> None:
    """With the parametrization v and outputs of 0, D(x) = x / (1 + s^2), which is best for Gaussian latents."""
    model = tiny_model()
    for parameter in model.denoiser.parameters():
        torch.nn.init.zeros_(parameter)
    shape = (200, *model.latent_shape())
    pool = Pool(torch.randn(shape), torch.randn(shape), {"text": ["a red car"] * 200})
    for level in levels_of(model.diffusion.schedule):
        assert float(relative_error(model, pool, level).mean()) == pytest.approx(1, abs=0.04)


def test_the_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    model = tiny_model()
    batch = {"image": torch.rand(3, 3, 16, 16) * 2 - 1, "text": ["a", "b", "c"], "key": ["0", "1", "2"]}
    together = encoded(model, batch, [5, 6, 7])
    alone = encoded(model, {name: value[1:2] for name, value in batch.items()}, [6])
    torch.testing.assert_close(together.latents[1:2], alone.latents)
    assert torch.equal(together.noise[1:2], alone.noise)
    found = relative_error(model, together, 0.5)[1:2]
    torch.testing.assert_close(found, relative_error(model, alone, 0.5), rtol=1e-4, atol=1e-5)


def probe_error(mode: Tensor, std: Tensor, steps: int) -> float:
    stage = probe.normalized(tiny_model().first_stage, mode[:40], std[:40])
    model = probe.new_probe(stage, tiny_model().config.first_stage, (8, 8), seed=0)
    probe.train(model, mode[:40], std[:40], steps, seed=0)
    return float(probe.held_out_error(model, mode[40:], std[40:], range(24)).mean())


@pytest.mark.slow
def test_the_probe_learns_smooth_latents_and_no_noise() -> None:
    """Latents of a value a channel, whose posteriors are sharp, against posteriors that are nothing but noise."""
    smooth = torch.randn(64, 4, 1, 1).expand(-1, -1, 4, 4).contiguous()
    sharp, wide = torch.full_like(smooth, 0.05), torch.full_like(smooth, 50.0)
    assert probe_error(smooth, sharp, 100) < 0.85
    assert probe_error(smooth, sharp, 3) == probe_error(smooth, sharp, 3)
    assert probe_error(smooth, wide, 100) > 0.9
    assert probe_error(smooth, sharp, 1) > 0.9


def test_recalls_of_clip_are_those_of_its_training(folder: Path) -> None:
    subject = opened(folder, "clip.safetensors")
    assert subject.clip is not None
    clip, tokenizer = subject.clip
    batches = list(subject.measured())
    with torch.no_grad():
        texts = torch.cat([clip.encode_text(tokenizer(batch["text"])) for batch in batches])
        images = torch.cat([clip.encode_image(batch["image"]) for batch in batches])
    expected = recall_at_k(texts, images)
    assert {name: each.estimate.value for name, each in numbers(subject, "retrieval").items()} == pytest.approx(
        expected
    )


def test_a_class_is_the_mean_of_its_embeddings_in_all_templates() -> None:
    clip, templates = tiny_clip(), ("{}", "a {}, {} indeed")
    found = classifier(clip, TOKENIZER, ["red", "blue"], templates)
    with torch.no_grad():
        means = [clip.encode_text(TOKENIZER([name, f"a {name}, {name} indeed"])).mean(0) for name in ("red", "blue")]
    expected = torch.stack([mean / mean.norm() for mean in means], dim=1)
    torch.testing.assert_close(found, expected)


def test_calibration_of_two_captions_is_the_closed_form() -> None:
    """Cosines of +u and -u, the own caption the nearer one in p of the images: best at logit(p) / (2 u)."""
    n, p, u = 400, 0.75, 0.2
    target = torch.zeros(n, dtype=torch.long)
    sign = torch.where(torch.arange(n) < p * n, 1.0, -1.0).double()[torch.randperm(n)]
    cosine = torch.stack([u * sign, -u * sign], dim=1)
    best = best_scale(cosine, target)
    assert best.value == pytest.approx(math.log(p / (1 - p)) / (2 * u), rel=1e-6)
    # The interval is that of logit(p) for a share p of n: 1.96 / sqrt(n p (1 - p)).
    half = 1.96 / math.sqrt(n * p * (1 - p)) / (2 * u)
    assert best.high - best.value == pytest.approx(half, rel=0.01)
    confidence = 1 / (1 + math.exp(-2 * u * 9))
    assert calibration_error(cosine, target, 9.0).value == pytest.approx(abs(p - confidence))
    assert calibration_error(cosine, target, best.value).value == pytest.approx(0, abs=1e-6)
    assert best_scale(cosine.abs() * torch.tensor([1.0, -1.0]), target).contains(1e9)  # perfect: the larger, the better


def test_generated_images_are_those_of_their_seeds(folder: Path) -> None:
    subject = opened(folder, seed=3, images=5)
    made = subject.generated()
    assert len(made) == 5
    captions = [caption for batch in subject.measured() for caption in batch["text"]]
    assert made.captions == captions
    again = subject.generate([captions[4]], 7, subject.settings)
    torch.testing.assert_close(made.shown[4:], again)
    network = subject.networks[0]
    torch.testing.assert_close(made.features["own"][4:], network(again))


@pytest.mark.parametrize("reads", ["class", "none"])
def test_models_of_classes_and_without_conditions_are_compared_as_sets(reads: str, folder: Path) -> None:
    save(tiny_model(reads), folder / f"{reads}.safetensors")
    subject = opened(folder, f"{reads}.safetensors", images=22)
    assert numbers(subject, "fid")["fid"].n == 22
    assert numbers(subject, "recall_by_image") == {}
    made = subject.generated().shown
    assert made.shape[0] == 22
    assert subject.pipe is not None
    labels = {"label": [1 % 3]} if reads == "class" else {}
    again = subject.pipe(**labels, seed=1, output_type="pt", progress=False, **subject.settings)
    torch.testing.assert_close(made[1:2], again * 2 - 1, rtol=1e-2, atol=1e-2)


def test_copies_of_the_training_images_have_distance_0_and_are_memorised(folder: Path) -> None:
    subject = opened(folder)
    copies = subject.generated()
    copies.features["own"][:] = subject.true("train").features["own"][: len(copies)]
    found = numbers(subject, "memorisation")
    assert found["memorisation"].estimate.value == 1.0
    assert found["nearest_training_image"].estimate.value == 0
    assert found["nearest_training_image_true"].estimate.value > 0
