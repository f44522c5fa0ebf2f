"""Self-conditioning: what the network is given in training and in sampling, and where such a model can be used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.config import from_dict, to_dict
from ldm.denoiser import DenoiserConfig, UNet
from ldm.diffusion import SAMPLERS, SPECS, Composition, Diffusion, Guidance, WeightedLossConfig, guided
from ldm.diffusion.parametrization import Edm, Eps, Flow, Parametrization, V
from ldm.diffusion.schedule import ScaledLinear
from ldm.diffusion.self_conditioning import SelfConditioning
from ldm.editing import image_to_image, inpaint
from ldm.errors import CheckpointError, ConfigError
from ldm.formats import save
from ldm.model import LatentDiffusion
from ldm.nn.conditioning import Conditioning
from ldm.pipeline import Pipeline
from ldm.serving.batching import BatchedModel, BatchedPipeline, Batcher
from ldm.training.costs import step_cost
from ldm.training.experiment import Experiment
from ldm.training.stages import build_module, train_stage
from ldm.training.tasks import DenoiserTask
from ldm.training.tasks.task import Step
from tests.experiments import tiny_experiment
from tests.tiny import tiny_model

UNET = {"kind": "unet", "levels": [{"width": 16, "blocks": 2, "depth": 1}], "heads": 2, "groups": 4}
LATENT: dict[str, Any] = {"prompt": "a red apple", "seed": 1, "output_type": "latent", "progress": False}
PIXELS = ["clip=null", "trainer.threads=1", "vae.model.kind=identity", "denoiser.conditioner=none"]
PIXELS += [f"denoiser.model.{each}" for each in ("in_channels=3", "out_channels=3", "context_width=null")]
PIXELS += ["denoiser.model.vector_width=null", "denoiser.model.dropout=0"]


def self_conditioned(share: float = 0.5, **changes: Any) -> LatentDiffusion:
    return tiny_model(denoiser=UNET | {"context_width": 16, "self_conditioning": share}, **changes)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return self_conditioned()


@contextmanager
def evaluations(model: LatentDiffusion) -> Iterator[list[tuple[Tensor | None, Tensor]]]:
    """Record the estimate that the denoiser is given, and its output, at each evaluation."""
    seen: list[tuple[Tensor | None, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen.append((inputs[2].estimate, output))

    handle = model.denoiser.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


def task_of(experiment: Experiment) -> DenoiserTask:
    """The task of a denoiser whose last layer is not zero."""
    task = build_module(experiment, "denoiser").task
    assert isinstance(task, DenoiserTask)
    nn.init.normal_(unet_of(task.model).conv_out.weight)
    return task


def unet_of(model: LatentDiffusion) -> UNet:
    assert isinstance(model.denoiser, UNet)
    return model.denoiser


# The network


def test_estimate_is_appended_to_the_input_and_is_zero_if_absent(model: LatentDiffusion) -> None:
    network, x, level = unet_of(model), torch.randn(2, 4, 6, 8), torch.tensor([3.0, 700.0])
    cond = Conditioning(context=torch.randn(2, 5, 16))
    inputs: list[Tensor] = []
    handle = network.conv_in.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    estimate = torch.randn_like(x)
    with_zeros = network(x, level, replace(cond, estimate=torch.zeros_like(x)))
    assert torch.equal(network(x, level, cond), with_zeros)
    assert not torch.allclose(network(x, level, replace(cond, estimate=estimate)), with_zeros)
    handle.remove()
    assert [each.shape[1] for each in inputs] == [8, 8, 8]
    assert torch.equal(inputs[2], torch.cat([x, estimate], dim=1))


def test_networks_without_it_and_their_configs_are_unchanged() -> None:
    plain = tiny_model()
    assert "self_conditioning" not in to_dict(plain.config)["denoiser"]
    assert unet_of(plain).conv_in.in_channels == 4
    x, level, cond = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), Conditioning(context=torch.randn(1, 5, 16))
    assert torch.equal(plain.denoiser(x, level, replace(cond, estimate=x)), plain.denoiser(x, level, cond))
    assert plain.with_estimate(x, level, cond) is cond


def test_share_is_at_least_0_and_below_1() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=rf"self_conditioning is {share}; it must be at least 0, and below 1"):
            from_dict(DenoiserConfig, UNET | {"self_conditioning": share})


# Training


@pytest.mark.parametrize("parametrization", [Eps(), V(), Flow(), Edm(sigma_data=1.0)], ids=lambda each: each.kind)
def test_loss_is_that_of_the_second_pass_and_the_first_has_no_gradient(parametrization: Parametrization) -> None:
    diffusion = Diffusion(ScaledLinear(), parametrization)
    model = self_conditioned(diffusion=to_dict(diffusion))
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    sigma, cond = torch.tensor([0.2, 1.0, 9.0]), Conditioning(context=torch.randn(3, 12, 16, generator=generator))
    loss, _ = WeightedLossConfig().build()(
        model.denoiser, diffusion, x0, cond, sigma=sigma, noise=noise, self_condition=model.with_estimate
    )

    level = sigma[:, None, None, None]
    skip, out, inp = parametrization.scalings(level)
    x, c_noise = x0 + level * noise, parametrization.noise_level(sigma, diffusion.schedule)
    with torch.no_grad():
        first = model.denoiser(inp * x, c_noise, replace(cond, estimate=torch.zeros_like(x)))
    second = model.denoiser(inp * x, c_noise, replace(cond, estimate=skip * x + out * first))
    expected = (second - parametrization.target(x0, noise, level)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)
    weights = list(model.denoiser.parameters())
    gradients, wanted = (torch.autograd.grad(each.sum(), weights) for each in (loss, expected))
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_gives_the_share_of_the_batches_an_estimate(tmp_path: Path, precision: str) -> None:
    experiment = tiny_experiment(tmp_path, *PIXELS, "denoiser.model.self_conditioning=0.7")
    task = task_of(experiment).train()
    batch = {"image": torch.rand(2, 3, 16, 16) * 2 - 1, "key": ["a", "b"]}
    passes: list[int] = []
    for seed in range(40):
        step = Step(0, 0, torch.Generator().manual_seed(seed))
        with evaluations(task.model) as seen, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            (loss,) = task.losses(batch, step)
        passes.append(len(seen))
        assert seen[0][0] is None
        assert [output.requires_grad for _, output in seen] == [False, True][-len(seen) :]
        task.zero_grad()
        loss.value.backward()
        assert all(each.grad is not None and each.grad.any() for each in unet_of(task.model).conv_in.parameters())
    assert set(passes) == {1, 2}
    assert 0.5 < passes.count(2) / len(passes) < 0.9


def test_it_trains_resumes_bitwise_and_validates_with_estimates(tmp_path: Path) -> None:
    def trained(folder: str, *ends: int) -> dict[str, Tensor]:
        (tmp_path / folder).mkdir()
        settings = [*PIXELS, "denoiser.model.self_conditioning=0.5", "denoiser.train.log_every=1"]
        for end in ends:
            experiment = tiny_experiment(tmp_path / folder, *settings, f"denoiser.train.max_steps={end}")
            result = train_stage(experiment, "denoiser")
        return load_file(result)

    resumed, at_once = trained("resumed", 2, 4), trained("at_once", 4)
    assert [name for name in at_once if not torch.equal(resumed[name], at_once[name])] == []
    assert at_once["denoiser.conv_in.weight"].shape[1] == 6
    experiment = tiny_experiment(tmp_path / "at_once", *PIXELS, "denoiser.model.self_conditioning=0.5")
    task = task_of(experiment).eval()
    batch = {"image": torch.rand(2, 3, 16, 16) * 2 - 1, "key": ["a", "b"]}
    with torch.no_grad(), evaluations(task.model) as seen:
        first, second = (task.evaluate(batch, Step(0, 0, torch.Generator().manual_seed(0))) for _ in range(2))
    assert torch.equal(first["loss"], second["loss"])
    assert [each[0] is None for each in seen] == [True, False] * 2


def test_dry_run_counts_the_mean_of_the_batches(tmp_path: Path) -> None:
    flops = [
        step_cost(tiny_experiment(tmp_path, *PIXELS, f"denoiser.model.self_conditioning={share}"), "denoiser").flops
        for share in (0, 0.25, 0.5)
    ]
    assert flops[0] < flops[1] < flops[2]
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0], abs=1)
    assert flops[2] / flops[0] == pytest.approx(1 + 0.5 / 3, rel=0.1)  # a forward pass is a third of a step


# Sampling


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_each_evaluation_gets_the_conditional_estimate_of_the_one_before(model: LatentDiffusion, sampler: str) -> None:
    if SPECS[sampler].brownian:
        pytest.importorskip("torchsde", reason="needs the package torchsde, of the extra sde")
    denoised: list[Tensor] = []
    given: list[Tensor] = []
    plain = model.denoise

    def denoise(x: Tensor, sigma: Tensor, cond: Conditioning, options: Any = None) -> Tensor:
        assert cond.estimate is not None
        given.append(cond.estimate)
        denoised.append(plain(x, sigma, cond, options))
        return denoised[-1]

    model.denoise = denoise  # type: ignore[method-assign]
    try:
        Pipeline(model)(**LATENT, sampler=sampler, num_images_per_prompt=2, guidance_scale=4.0)
    finally:
        del model.denoise
    assert len(given) > 2
    assert torch.equal(given[0], torch.zeros(4, 4, 8, 8))
    for before, after in zip(denoised, given[1:], strict=False):
        assert torch.equal(after, torch.cat([before[:2]] * 2))


def test_rows_of_composed_and_perturbed_prompts_get_the_estimate_of_their_image() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, sigma: Tensor, cond: Conditioning, options: Any = None) -> Tensor:
        assert cond.estimate is not None
        assert cond.vector is not None
        seen.append((cond.estimate, x + cond.vector))
        return seen[-1][1]

    composition = Composition(rows=(0, 0, 1), weights=(0.5, 2.0, 1.0))
    denoise = SelfConditioning(network, 2, composition)
    conditional, unconditional, perturbed = (Conditioning(vector=torch.randn(rows, 3)) for rows in (3, 2, 3))
    guidance = Guidance(scale=3.0, perturbed=1.0)
    denoiser = guided(denoise, conditional, unconditional, guidance, perturbed, composition)
    for _ in range(2):
        denoiser(torch.randn(2, 3), torch.ones(2))
    (first, outputs), (second, _) = seen
    assert torch.equal(first, torch.zeros(8, 3))
    composed = composition.combine(outputs[:3], outputs[3:5])
    assert torch.equal(second, composed[[0, 0, 1, 0, 1, 0, 0, 1]])


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.0},
        {"guidance": Guidance(scale=3.0, interval=(0.5, 5.0), perturbed=1.0)},
        {"prompt": "a red apple AND a blue sky", "prompt_syntax": "weighted"},
        {"cache_interval": 2},
        {"token_merging": 0.5},
    ],
    ids=str,
)
def test_it_works_with_guidance_and_shortcuts_and_images_do_not_depend_on_their_batch(
    model: LatentDiffusion, settings: dict[str, Any]
) -> None:
    pipe, options = Pipeline(model), LATENT | settings
    images = pipe(**options, num_images_per_prompt=3)
    assert images.isfinite().all()
    assert torch.equal(pipe(**options, num_images_per_prompt=3), images)  # nothing is left of the sampling before
    torch.testing.assert_close(pipe(**options, num_images_per_prompt=3, batch_size=2), images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipe(**options | {"seed": 3}), images[2:], rtol=1e-4, atol=1e-4)


def test_threads_and_batches_of_a_server_do_not_share_estimates(model: LatentDiffusion) -> None:
    pipe = Pipeline(model)
    requests = [LATENT | {"seed": seed, "num_inference_steps": 3 + seed} for seed in range(4)]
    expected = [pipe(**request) for request in requests]
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda request: pipe(**request), requests))
        batcher = Batcher()
        batched = BatchedPipeline(BatchedModel.of(model, batcher))

        def sample(request: dict[str, Any]) -> Tensor:
            with batcher.sampling():
                latents: Tensor = batched(**request)
            return latents

        joined = list(threads.map(sample, requests))
        batcher.close()
    for image, other, wanted in zip(images, joined, expected, strict=True):
        assert torch.equal(image, wanted)
        assert torch.equal(other, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "openvino"])
def test_compiled_networks_make_the_same_images(model: LatentDiffusion, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="needs the package openvino, of the extra openvino")
    options = {"cache": None} if backend == "openvino" else {}
    pipe = Pipeline(self_conditioned()).compile(backend, progress=False, **options)
    torch.testing.assert_close(pipe(**LATENT), Pipeline(model)(**LATENT), rtol=1e-3, atol=1e-3)


def test_editing_starts_with_zeros(model: LatentDiffusion) -> None:
    pipe, image, mask = Pipeline(model), torch.rand(3, 16, 16), torch.zeros(16, 16)
    mask[:8] = 1
    options: dict[str, Any] = {"seed": 1, "progress": False}
    with evaluations(model) as seen:
        image_to_image(pipe, "a red apple", image, strength=0.5, **options)
        inpaint(pipe, "a red apple", image, mask, **options)
    zeros = [estimate is not None and not estimate.any() for estimate, _ in seen]
    assert zeros == [True, False, True, False, False, False]


# Files


def test_reopened_model_makes_the_same_images_and_foreign_formats_refuse_it(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    expected = Pipeline(model)(**LATENT)
    save(model, tmp_path / "model.safetensors")
    loaded = Pipeline.from_pretrained(tmp_path / "model.safetensors", device="cpu", dtype=torch.float32)
    assert loaded.model.config == model.config
    torch.testing.assert_close(loaded(**LATENT), expected, rtol=1e-5, atol=1e-5)
    low = loaded.to(dtype=torch.bfloat16)(**LATENT)
    assert low.isfinite().all()
    for form, name in {"ldm": "file.safetensors", "diffusers": "folder"}.items():
        with pytest.raises(CheckpointError, match=r"has no self-conditioning, .* write a native file"):
            save(model, tmp_path / name, form)
        assert not (tmp_path / name).exists()


def test_controlnet_of_its_encoder_uses_the_estimate(model: LatentDiffusion) -> None:
    encoder = unet_of(model).copy_encoder()
    x, level = torch.randn(1, 4, 8, 8), torch.tensor([3.0])
    cond = Conditioning(context=torch.randn(1, 5, 16), estimate=torch.randn(1, 4, 8, 8))
    assert not torch.allclose(encoder(x, level, cond).middle, encoder(x, level, replace(cond, estimate=None)).middle)
