"""Sampling and training on a CUDA device, compared with the CPU, by ``make test-gpu``; skipped where there is no such device."""

from __future__ import annotations

import copy
import csv
import gc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.diffusion import SPECS
from ldm.diffusion.samplers import SAMPLERS
from ldm.pipeline import Pipeline
from ldm.training.costs import step_cost
from ldm.training.engine import StageModule
from ldm.training.experiment import load_config
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment
from tests.tiny import tiny_model

DEVICE = "cuda"
PROMPTS = ["red apple", "woman scientist dark skin tone", "Japan"]
STAGES = ("vae", "clip", "denoiser")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and make test-gpu")


@pytest.fixture(autouse=True)
def _as_precise_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def images(pipe: Pipeline, prompts: Any = PROMPTS, **settings: Any) -> torch.Tensor:
    defaults: dict[str, Any] = {"seed": 3, "num_inference_steps": 10, "output_type": "pt", "progress": False}
    made: torch.Tensor = pipe(prompts, **(defaults | settings)).float().cpu()
    return made


@pytest.fixture(scope="module")
def shipped() -> Pipeline:
    pipe: Pipeline = Pipeline.from_pretrained("emoji", device=DEVICE, dtype=torch.float32)
    return pipe


def test_the_device_does_not_change_an_image(shipped: Pipeline) -> None:
    cpu = Pipeline.from_pretrained("emoji", device="cpu", dtype=torch.float32)
    assert (images(shipped) - images(cpu)).abs().max() < 1 / 255


def test_the_default_precision_is_bf16_and_close_to_fp32(shipped: Pipeline) -> None:
    pipe = Pipeline.from_pretrained("emoji")
    assert (pipe.device.type, pipe.dtype) == (DEVICE, torch.bfloat16)
    assert (images(pipe) - images(shipped)).square().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    pipe = Pipeline.from_pretrained("emoji", device=DEVICE, dtype=dtype)
    together = images(pipe)
    alone = torch.cat([images(pipe, prompt, seed=3 + i) for i, prompt in enumerate(PROMPTS)])
    assert (together - alone).square().mean() < {torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_networks_make_the_same_images(shipped: Pipeline, mode: str) -> None:
    """``reduce-overhead`` replays CUDA graphs, whose results are overwritten by the next replay."""
    pipe = copy.deepcopy(shipped)
    pipe.model.denoiser.compile(mode=mode)
    for seed in (3, 4):  # the second time, graphs are replayed
        expected, made = (images(each, seed=seed) for each in (shipped, pipe))
        assert (made - expected).abs().max() < 2 / 255


@pytest.mark.parametrize("backend", ["cudagraphs", "inductor"])
def test_backends_make_the_same_images(shipped: Pipeline, backend: str) -> None:
    """Also with other seeds, numbers of images and weights, when graphs are replayed or recorded again."""
    pipe, plain = copy.deepcopy(shipped).compile(backend, progress=False), copy.deepcopy(shipped)
    for seed, prompts in ((3, PROMPTS), (4, PROMPTS), (3, PROMPTS[0]), (5, PROMPTS)):
        assert (images(pipe, prompts, seed=seed) - images(plain, prompts, seed=seed)).abs().max() < 2 / 255
    for each in (pipe, plain):
        each.model.load_state_dict({name: 0.95 * value for name, value in each.model.state_dict().items()})
    assert (images(pipe) - images(plain)).abs().max() < 2 / 255


def test_threads_share_a_pipeline_of_cuda_graphs(shipped: Pipeline) -> None:
    pipe = copy.deepcopy(shipped).compile(progress=False)
    assert pipe.model.accelerator.backend.kind == "cudagraphs"
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda seed: images(pipe, seed=seed), range(4)))
    for seed, image in enumerate(made):
        assert (image - images(shipped, seed=seed)).abs().max() < 2 / 255


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_the_same_latents_as_on_the_cpu(sampler: str) -> None:
    pipe = Pipeline(tiny_model())
    settings: dict[str, Any] = {"sampler": sampler, "output_type": "latent", "num_inference_steps": 6}
    expected = images(pipe, "a red car", **settings)
    made = images(Pipeline(copy.deepcopy(pipe.model)).to(DEVICE), "a red car", **settings)
    tolerance = 0.05 if SPECS[sampler].adaptive else 1e-3  # rounding may change its steps
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=tolerance)


def train(folder: Path, *overrides: str) -> list[dict[str, str]]:
    """Train all stages of the tiny experiment; return the metrics of the denoiser."""
    experiment = tiny_experiment(folder, *overrides)
    for stage in STAGES:
        assert train_stage(experiment, stage).is_file()
    with (folder / "run/denoiser/metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(rows: list[dict[str, str]]) -> list[float]:
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


GPU = ("trainer.accelerator=gpu", "denoiser.model.dropout=0")


def test_training_in_fp32_gives_the_losses_of_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "gpu").mkdir()
    cpu = train(tmp_path / "cpu", "denoiser.model.dropout=0")
    gpu = train(tmp_path / "gpu", *GPU)
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-2)
    assert len(losses(gpu)) == 6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_all_stages_train_in_mixed_precision_with_cached_latents(tmp_path: Path, precision: str) -> None:
    rows = train(tmp_path, *GPU, f"trainer.precision={precision}", "data.cache_latents=true", "data.workers=2")
    assert len(losses(rows)) == 6
    pipe = Pipeline.from_pretrained(tmp_path / "run", device="cpu", dtype=torch.float32)
    assert images(pipe, "red apple").isfinite().all()


def test_compiled_networks_train(tmp_path: Path) -> None:
    rows = train(tmp_path, *GPU, "trainer.compile=true", "trainer.precision=bf16")
    assert len(losses(rows)) == 6


def test_a_resumed_training_continues_as_without_interruption(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    expected = train(straight, *GPU)
    for stage in STAGES:
        for steps in (3, 6):
            train_stage(tiny_experiment(stopped, *GPU, f"{stage}.train.max_steps={steps}"), stage)
    with (stopped / "run/denoiser/metrics.csv").open(newline="") as file:
        assert losses(list(csv.DictReader(file))) == pytest.approx(losses(expected), rel=1e-3)


@pytest.mark.parametrize("stage", ["vae", "clip", "denoiser"])
def test_predicted_memory_is_within_a_tenth_of_a_real_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    """At the size of the shipped model; what earlier trainings and cuBLAS left is freed before."""
    overrides = [f"run_dir={tmp_path / 'run'}", f"{stage}.train.max_steps=4", "data.workers=0", "data.cache=none"]
    overrides += ["data.cache_latents=false", "vae.loss.disc_start=0", f"{stage}.train.validate_every=100"]
    if stage != "vae":
        overrides += ["vae.train.init=emoji", "vae.train.max_steps=1"]
    if stage == "denoiser":
        overrides += ["clip.train.max_steps=1", "clip.train.batch_size=8"]
    experiment = load_config("configs/emoji_64.yaml", overrides)
    for before in STAGES[: STAGES.index(stage)]:
        train_stage(experiment, before)
    peaks: list[int] = []
    plain = StageModule.training_step

    def training_step(module: StageModule, batch: Mapping[str, Any], index: int) -> None:
        torch.cuda.reset_peak_memory_stats()
        plain(module, batch, index)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())

    gc.collect()  # of the stages before
    torch._C._cuda_clearCublasWorkspaces()
    before_training = torch.cuda.memory_allocated()
    monkeypatch.setattr(StageModule, "training_step", training_step)
    train_stage(experiment, stage)
    predicted = step_cost(experiment, stage, device_type=DEVICE).memory
    assert peaks[-1] - before_training == pytest.approx(predicted, rel=0.1)
