"""Predicted operations and memory of a step against those of a real one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ldm.benchmarks.peaks import count_operations
from ldm.training.accelerators import accelerator, cublas_workspace
from ldm.training.costs import flops_by_shape, flops_per_sample, step_cost
from ldm.training.engine import StageModule
from ldm.training.experiment import Experiment
from ldm.training.stages import train_stage
from ldm.training.system_metrics import SystemMetrics
from tests.experiments import tiny_experiment

STAGES = ("vae", "clip", "denoiser")


class Measured:
    """Operations of each step, and the most bytes that torch's allocator has given out in one step, with what existed before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory_at: int):
        self.flops: list[int] = []
        self.bytes = 0
        plain = StageModule.training_step

        def training_step(module: StageModule, batch: Mapping[str, Any], index: int) -> None:
            if index < memory_at - 2:
                return plain(module, batch, index)
            if index < memory_at:
                self.flops.append(count_operations(lambda: plain(module, batch, index)).total)
                return None
            existing = [*module.task.parameters(), *module.task.buffers(), *batch.values()]
            existing += [  # of accumulated batches
                each.grad for each in module.task.parameters() if each.grad is not None
            ]
            existing += module.ema.average.values() if module.ema else []
            for optimizer in module.trainer.optimizers:
                existing += [value for state in optimizer.state.values() for value in state.values()]
            storages = [each.untyped_storage() for each in existing if isinstance(each, Tensor)]
            now = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                plain(module, batch, index)
            results: Any = profiler.profiler
            changes = [each for each in results.kineto_results.events() if each.name() == "[memory]"]
            for change in sorted(changes, key=lambda each: each.start_ns()):
                now += change.nbytes()
                self.bytes = max(self.bytes, now)
            return None

        monkeypatch.setattr(StageModule, "training_step", training_step)


def experiments(folder: Path, *overrides: str) -> Experiment:
    """Return the tiny experiment without validations in between, which change nothing that is measured."""
    settings = [f"{stage}.train.{each}" for stage in STAGES for each in ("validate_every=100", "max_steps=5")]
    return tiny_experiment(folder, *settings, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], [f"{stage}.train.gradient_checkpointing=true" for stage in STAGES]])
def test_prediction_is_within_a_tenth_of_a_real_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str]
) -> None:
    experiment = experiments(tmp_path, *overrides)
    for stage in STAGES:
        with monkeypatch.context() as context:
            real = Measured(context, memory_at=4)
            train_stage(experiment, stage)
        cost = step_cost(experiment, stage)
        if stage == "clip":  # whose operations depend on the longest caption of a batch; two batches are an epoch
            assert cost.flops == pytest.approx(sum(real.flops) / len(real.flops), rel=0.1)
        else:
            assert cost.flops == real.flops[-1]
        assert cost.memory == pytest.approx(real.bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulation_frozen_encoders_and_cached_latents_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str
) -> None:
    overrides = [
        "vae.train.max_steps=2",
        "clip.train.max_steps=2",
        "denoiser.train.accumulate=3",
        "denoiser.train.max_steps=2",
        "denoiser.conditioner.trainable=false",
        "data.cache_latents=true",
        f"denoiser.train.precision={precision}",
    ]
    experiment = experiments(tmp_path, *overrides)
    for stage in ("vae", "clip"):
        train_stage(experiment, stage)
    real = Measured(monkeypatch, memory_at=4)
    train_stage(experiment, "denoiser")
    cost = step_cost(experiment, "denoiser")
    assert cost.samples == 12
    assert cost.flops == 3 * real.flops[-1]
    assert cost.memory == pytest.approx(real.bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "denoiser"])
def test_operations_depend_on_the_shape_of_the_images(tmp_path: Path, stage: str) -> None:
    """Those of a shape that was not simulated are within 1 % of its simulation."""
    shapes = "data.buckets.shapes=[[8, 32], [16, 24], [16, 16], [40, 24], [48, 24]]"
    experiment = experiments(tmp_path, shapes, "vae.loss.disc_layers=1")
    flops = flops_by_shape(experiment, stage)
    for shape in ((8, 32), (16, 24), (40, 24)):
        assert flops(shape) == pytest.approx(flops_per_sample(experiment, stage, shape=shape), rel=0.01)
    assert flops((32, 16)) > 2 * flops((16, 16))
    plain = experiments(tmp_path)
    assert flops_by_shape(plain, stage)(plain.data.image_shape[1:]) == flops_per_sample(plain, stage)


@pytest.mark.slow
def test_memory_is_that_of_the_largest_shape(tmp_path: Path) -> None:
    experiment = experiments(tmp_path, "data.buckets.shapes=[[8, 16], [32, 24]]")
    assert step_cost(experiment, "vae") == step_cost(experiment, "vae", shape=(32, 24))
    assert step_cost(experiment, "vae").memory > step_cost(experiment, "vae", shape=(8, 16)).memory


def test_mfu_counts_the_shapes_of_the_batches() -> None:
    metrics = SystemMetrics(torch.device("cpu"), "fp32", 4, 2)
    metrics.flops_of, metrics.peak = math.prod, 1e3
    metrics.restart(0, 0.0)
    for shape in ((8, 16), (16, 16), (32, 8)):
        metrics.add(4, shape)
    rate = (row := metrics.row(3, 0.0))["system/samples_per_second"] / 12
    assert row["system/mfu"] == pytest.approx(4 * (128 + 256 + 256) * rate / 1e3)
    metrics.add(4, (8, 8))
    rate = (row := metrics.row(4, 0.0))["system/samples_per_second"] / 4
    assert row["system/mfu"] == pytest.approx(4 * 64 * rate / 1e3)


def test_two_workspaces_of_cublas_are_predicted_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert {cublas_workspace(each) for each in ("h100", "h200")} == {2**25}
    assert {cublas_workspace(each) for each in ("a100", "t4", None)} == {2**23 + 2**17}
    cost = step_cost(experiments(tmp_path), "denoiser", device_type="cuda", device="h200")
    assert cost.workspaces == 2 * 2**25
    assert cost.memory == cost.weights + cost.optimizer + cost.ema + cost.gradients + cost.activations + 2**26
    shared = cost.trained + cost.optimizer + cost.ema + cost.gradients
    assert cost.sharded_memory(4) == cost.memory - shared + shared // 4
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert cublas_workspace("a100") == 2**25
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert cublas_workspace("h200") == 2**23 + 2**17


def test_predictions_with_workspaces_are_within_a_tenth_of_measurements() -> None:
    """Of emoji_64 on an H200, in GiB: tensors counted without a device, and most memory allocated in a step."""
    workspaces = 2 * accelerator("h200").workspace / 2**30
    for tensors, measured in ((0.146, 0.218), (0.886, 1.003), (0.4125, 0.4376)):
        assert tensors + workspaces == pytest.approx(measured, rel=0.1)


def test_operations_before_the_discriminator_starts_are_fewer(tmp_path: Path) -> None:
    experiment = experiments(tmp_path)
    assert flops_per_sample(experiment, "vae", step=0) < flops_per_sample(experiment, "vae")


def test_recomputation_is_no_operation_of_the_model(tmp_path: Path) -> None:
    plain = experiments(tmp_path)
    checkpointed = experiments(tmp_path, "denoiser.train.gradient_checkpointing=true")
    assert flops_per_sample(checkpointed, "denoiser") == flops_per_sample(plain, "denoiser")
    assert step_cost(checkpointed, "denoiser").flops > step_cost(plain, "denoiser").flops


def test_devices_share_what_belongs_to_trained_weights(tmp_path: Path) -> None:
    cost = step_cost(experiments(tmp_path), "denoiser")
    frozen = cost.weights - cost.trained
    assert cost.sharded_memory(1) == cost.memory
    assert frozen + cost.activations < cost.sharded_memory(1000) < 1.01 * (frozen + cost.activations)


def test_the_peak_of_this_cpu_is_measured() -> None:
    assert 1e9 < accelerator("cpu").peak("fp32") < 1e14
    assert accelerator("H100").peak("bf16") == 989e12
