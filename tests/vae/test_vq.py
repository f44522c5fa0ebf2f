from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from ldm.config import from_dict
from ldm.data.config import ShardsData
from ldm.data.latents import cache_latents
from ldm.data.samples import BatchIndices
from ldm.errors import ConfigError
from ldm.formats import load
from ldm.training.stages import train_stage
from ldm.vae import VQ, FirstStageConfig, Tiling
from ldm.vae.metrics import measure_latents
from ldm.vae.vq import Codebook, QuantizedLatent
from tests.data.pictures import write_shards
from tests.experiments import TRAIN, tiny_experiment, write_experiment
from tests.processes import run_on_ranks

CONFIG = {"kind": "vq", "widths": [8, 16], "blocks": 1, "latent_channels": 4, "groups": 4, "codes": 32}


def small_vq(**changes: Any) -> VQ:
    torch.manual_seed(0)
    stage = from_dict(FirstStageConfig, CONFIG | changes).build()
    assert isinstance(stage, VQ)
    return stage


def codebook_of(codes: Tensor, **settings: float) -> Codebook:
    """A codebook with these codes, each of which has been assigned one vector a batch."""
    codebook = Codebook(*codes.shape, **{"decay": 0.9, "restart": 0.0} | settings)
    codebook.codes.copy_(codes)
    codebook.sums.copy_(codes)
    codebook.counts.fill_(1.0)
    return codebook


# Quantisation


@pytest.mark.parametrize("autocast", [False, True])
def test_the_nearest_code_is_that_of_all_differences(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 under autocast too, and in parts."""
    codebook, x = Codebook(50, 3, 0.9, 0.0), torch.randn(200, 3)
    expected = np.square(x.numpy()[:, None] - codebook.codes.numpy()).sum(-1).argmin(1)
    for distances in (10, 50 * 7, 1 << 24):
        monkeypatch.setattr("ldm.vae.vq.DISTANCES", distances)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            np.testing.assert_array_equal(codebook.nearest(x), expected)


def test_quantised_latents_are_codes_and_stay_as_they_are() -> None:
    stage = small_vq()
    latent = torch.randn(2, 4, 3, 5)
    quantized = stage.quantize(latent)
    codes = {tuple(code) for code in stage.codebook.codes.tolist()}
    assert all(tuple(vector) in codes for vector in quantized.movedim(1, 3).flatten(0, 2).tolist())
    assert torch.equal(stage.quantize(quantized), quantized)
    assert torch.equal(stage.decode(latent), stage.decode(quantized))


def test_the_gradient_passes_the_quantisation_straight_through() -> None:
    """Closed form: of sum(w * quantized) it is w, of the commitment loss 2 (latent - code); the codes get none."""
    stage = small_vq()
    latent, w = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(2, 4, 3, 5)
    (gradient,) = torch.autograd.grad((w * stage.quantize(latent)).sum(), latent)
    assert torch.equal(gradient, w)

    commitment = QuantizedLatent(latent, stage.codebook).regularization()
    distance = latent.detach() - stage.quantize(latent.detach())
    torch.testing.assert_close(commitment, distance.square().sum((1, 2, 3)))
    (gradient,) = torch.autograd.grad(commitment.sum(), latent)
    torch.testing.assert_close(gradient, 2 * distance)
    assert not any(name.startswith("codebook") for name, _ in stage.named_parameters())


def test_perplexity_and_usage_are_those_of_the_codes() -> None:
    """All codes equally often: perplexity k; a code alone: 1; shares 1/2, 1/4, 1/4: 2^1.5. Batches add up."""
    codes = torch.eye(4)
    codebook = codebook_of(codes)

    def metrics(*batches: list[int]) -> dict[str, float]:
        posteriors = [QuantizedLatent(codes[batch].T[None, :, None], codebook) for batch in batches]
        sums = {name: torch.stack([each.sums()[name] for each in posteriors]).sum(0) for name in posteriors[0].sums()}
        return {name: value.item() for name, value in QuantizedLatent.metrics(sums, len(batches)).items()}

    assert metrics([0, 1, 2, 3]) == pytest.approx({"perplexity": 4, "usage": 1, "commitment": 0})
    assert metrics([2, 2, 2]) == pytest.approx({"perplexity": 1, "usage": 0.25, "commitment": 0})
    assert metrics([0, 0, 1], [2]) == pytest.approx({"perplexity": 2**1.5, "usage": 0.75, "commitment": 0})


# Learning


def test_the_codes_follow_the_moving_averages_of_the_paper() -> None:
    """Appendix A.1, equations 6 to 8, in numpy."""
    rng = np.random.default_rng(0)
    codes, decay = rng.standard_normal((5, 3)), 0.8
    codebook = codebook_of(torch.from_numpy(codes).float(), decay=decay)
    counts, sums = np.ones(5), codes.copy()
    for _ in range(6):
        x = rng.standard_normal((40, 3))
        index = np.square(x[:, None] - codes).sum(-1).argmin(1)
        codebook.update(torch.from_numpy(x).float(), codebook.nearest(torch.from_numpy(x).float()))
        for i in range(5):
            counts[i] = counts[i] * decay + (1 - decay) * (index == i).sum()
            sums[i] = sums[i] * decay + (1 - decay) * x[index == i].sum(0)
        codes = sums / counts[:, None]
        np.testing.assert_allclose(codebook.codes, codes, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(codebook.counts, counts, rtol=1e-5)


def test_without_memory_an_update_is_a_step_of_k_means() -> None:
    codebook = codebook_of(torch.tensor([[0.0], [10.0]]), decay=0.0)
    x = torch.tensor([[1.0], [2.0], [8.0], [12.0], [13.0]])
    codebook.update(x, codebook.nearest(x))
    assert torch.equal(codebook.codes, torch.tensor([[1.5], [11.0]]))


def clusters(centres: Tensor, generator: torch.Generator) -> Tensor:
    return centres.repeat(32, 1) + 0.05 * torch.randn(32 * len(centres), centres.shape[1], generator=generator)


def test_codes_converge_to_the_means_of_clusters() -> None:
    """From random codes, one for each cluster: of two codes that share a cluster, one moves to a cluster that has none."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[x, y] for x in (-6.0, -2.0, 2.0, 6.0) for y in (-3.0, 3.0)])
    codebook = Codebook(len(centres), 2, 0.9, 0.7)
    for _ in range(150):
        x = clusters(centres, generator)
        codebook.update(x, codebook.nearest(x))
    assert sorted(codebook.nearest(centres).tolist()) == [*range(len(centres))]
    assert (
        codebook.codes[codebook.nearest(centres)] - centres
    ).abs().max() < 0.03  # 0.05 / sqrt(32 / 0.1) = 0.003 each


def test_dead_codes_are_replaced_by_vectors_of_the_batch() -> None:
    """Unused codes die out when their average falls below the share; without restarts they stay where they are."""
    codes = torch.tensor([[0.0, 0.0], [100.0, 100.0], [-100.0, 100.0]])
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    restarted, kept = codebook_of(codes, restart=0.1), codebook_of(codes, restart=0.0)
    steps = 0
    while torch.allclose(restarted.codes[1:], codes[1:]):
        for codebook in (restarted, kept):
            codebook.update(x, codebook.nearest(x))
        steps += 1
    assert steps == 1  # an average of 0.9 is below 0.1 times 30 / 3
    assert all((x - code).abs().amax(1).min() < 1e-5 for code in restarted.codes[1:])
    assert restarted.counts[1:].tolist() == [10.0, 10.0]
    torch.testing.assert_close(kept.codes[1:], codes[1:])
    restarted.update(x, restarted.nearest(x))
    assert restarted.nearest(x).unique().numel() == 3


def test_the_first_batch_makes_the_codebook() -> None:
    codebook, x = Codebook(16, 4, 0.99, 0.0), 50 + torch.randn(300, 4)
    codebook.update(x, codebook.nearest(x))
    assert (codebook.codes.mean() - 50).abs() < 1
    assert codebook.nearest(x).unique().numel() > 8


BATCHES = torch.randn(12, 20, 3, generator=torch.Generator().manual_seed(0))


def _learned(batches: list[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    codebook = Codebook(8, 3, 0.9, 0.2)
    for batch in batches:
        codebook.update(batch, codebook.nearest(batch))
    return codebook.state_dict()


def _learn_on_rank(folder: Path) -> None:
    rank = dist.get_rank()
    torch.save(_learned([batch.chunk(2)[rank] for batch in BATCHES]), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_have_one_codebook(tmp_path: Path) -> None:
    """The same on both, and that of one process with both batches, including the codes that are restarted."""
    run_on_ranks(partial(_learn_on_rank, tmp_path), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    expected = _learned(list(BATCHES))
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
        torch.testing.assert_close(tensor, expected[name], msg=name)


# As a first stage


def test_a_vq_is_refused_if_its_numbers_make_no_sense() -> None:
    for changes in ({"codes": 0}, {"decay": 1.0}, {"restart": -0.1}, {"widths": [6]}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))}"):
            from_dict(FirstStageConfig, CONFIG | changes)


def test_an_update_moves_the_codes_to_the_latents_and_validation_does_not() -> None:
    stage, image = small_vq(), torch.rand(4, 3, 8, 8) * 2 - 1
    before = stage.state_dict()["codebook.codes"].clone()
    posterior = stage.encode(image)
    stage.decode(posterior.sample(torch.zeros(())))
    assert torch.equal(stage.codebook.codes, before)
    for _ in range(3):
        posterior = stage.encode(image)
        stage.update(posterior)
    assert (
        posterior.regularization().mean()
        < 0.5 * QuantizedLatent(posterior.mode, codebook_of(before)).regularization().mean()
    )


def test_statistics_of_the_latents_are_those_before_quantisation() -> None:
    stage, images = small_vq(), torch.rand(6, 3, 8, 8) * 2 - 1
    measure_latents(stage, [{"image": part} for part in images.split(4)])
    latent = stage.encode(images).mode.detach()
    torch.testing.assert_close(stage.latent_mean, latent.mean((0, 2, 3)))
    torch.testing.assert_close(stage.latent_std, latent.std((0, 2, 3), correction=0))


@torch.no_grad()
def test_a_tiled_vq_decodes_codes() -> None:
    stage, latent = small_vq(middle_attention=False), torch.randn(1, 4, 24, 24)
    expected = stage.decode(latent)
    tiled = Tiling(16, 8).decode(stage, latent)
    assert (tiled - expected).abs().mean() < 0.05 * expected.std()  # measured: 0.025
    posterior = Tiling(6, 2).encode(stage, torch.randn(3, 3, 8, 8))
    assert isinstance(posterior, QuantizedLatent)
    assert posterior.regularization().shape == (3,)


def test_cached_latents_decode_to_the_same_images(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [6])
    samples = ShardsData(str(tmp_path / "shards"), size=8, workers=0).open("train")
    stage = small_vq().eval()
    with torch.no_grad():
        stage.update(stage.encode(samples[BatchIndices(np.arange(6))]["image"]))
    cached = cache_latents(stage, "mark", samples, tmp_path / "latents.safetensors")
    assert load_file(tmp_path / "latents.safetensors")["posterior"].shape == (6, 1, 4, 4, 4)
    batch, images = cached[BatchIndices(np.arange(6))], samples[BatchIndices(np.arange(6))]
    with torch.no_grad():
        posterior, exact = stage.posterior(batch), stage.posterior(images)
        torch.testing.assert_close(posterior.mode, exact.mode, rtol=1e-3, atol=1e-4)  # fp16 keeps 11 bits
        same = stage.codebook.nearest(exact.mode.movedim(1, 3).flatten(0, 2)) == stage.codebook.nearest(
            posterior.mode.movedim(1, 3).flatten(0, 2)
        )
        assert same.float().mean() > 0.95


def test_an_experiment_with_vq_trains_resumes_and_samples(tmp_path: Path) -> None:
    """Stage 1 stopped halfway ends as without the stop, bit for bit; stages 1 and 3 make a model that a file holds."""
    section = {"model": CONFIG, "loss": {"kl": 0.25, "adversarial": 0.0}, "train": TRAIN}
    at_once, stopped = tmp_path / "at_once", tmp_path / "stopped"
    for folder in (at_once, stopped):
        folder.mkdir()
        write_experiment(folder)
    overrides = [f"vae={section}", "clip=null", "denoiser.conditioner=none", "denoiser.model.context_width=null"]
    overrides += ["denoiser.model.vector_width=null", "denoiser.prompts=[]", "data.cache_latents=true"]
    expected = train_stage(tiny_experiment(at_once, *overrides), "vae")
    shorter = [f"vae={section | {'train': section['train'] | {'max_steps': 3}}}", *overrides[1:]]
    train_stage(tiny_experiment(stopped, *shorter), "vae")
    resumed = train_stage(tiny_experiment(stopped, *overrides), "vae")
    a, b = load_file(expected), load_file(resumed)
    assert a["codebook.updates"] == 6
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    header = (at_once / "run" / "vae" / "metrics.csv").read_text().splitlines()[0]
    for name in ("commitment", "usage", "perplexity"):
        assert {f"train/{name}", f"val/{name}"} <= {*header.split(",")}

    train_stage(tiny_experiment(at_once, *overrides), "denoiser")
    model = load(at_once / "run")
    assert isinstance(model.first_stage, VQ)
    assert torch.equal(model.first_stage.codebook.codes, a["codebook.codes"])
    assert model.decode(torch.randn(2, 4, 8, 8)).shape == (2, 3, 16, 16)
