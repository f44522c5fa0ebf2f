"""Predicted operations and memory of a step against those of a real one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ldm.training.accelerators import accelerator
from ldm.training.costs import flops_per_sample, step_cost
from ldm.training.engine import StageModule
from ldm.training.experiment import Experiment
from ldm.training.stages import train_stage
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
                with FlopCounterMode(display=False) as counter:
                    plain(module, batch, index)
                self.flops.append(counter.get_total_flops())
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
