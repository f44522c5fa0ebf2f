"""Losses with parameters and losses that read features, in the trainings of the three stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.clip.loss import CrossEntropy, CrossEntropyConfig
from ldm.diffusion.loss import WeightedLoss, WeightedLossConfig
from ldm.errors import ConfigError, TrainingError
from ldm.training.config import TrainConfig
from ldm.training.engine import StageModule
from ldm.training.experiment import Experiment
from ldm.training.fit import fit
from ldm.training.stages import build_module, data_of, train_stage
from ldm.training.tasks.task import Step
from ldm.training.tasks.vae import VAETask
from ldm.vae.loss import AutoencoderLossConfig, ReconstructionLoss
from tests.experiments import tiny_experiment


def train(folder: Path, stage: str, *overrides: str, steps: int = 4) -> Path:
    settings = [f"{stage}.train.{each}" for each in (f"max_steps={steps}", "validate_every=2")]
    return train_stage(tiny_experiment(folder, *settings, *overrides), stage)


def checkpoint(folder: Path, stage: str) -> dict[str, Any]:
    return torch.load(folder / "run" / stage / "last.ckpt", weights_only=True)


PIXELS = ["vae.model.kind=identity", "denoiser.model.in_channels=3", "denoiser.model.out_channels=3"]
UNCONDITIONAL = ["denoiser.conditioner=none", "denoiser.model.context_width=null", "denoiser.model.vector_width=null"]
DENOISER = [*PIXELS, *UNCONDITIONAL, "clip=null"]


@pytest.mark.parametrize(
    ("stage", "overrides", "name"),
    [
        ("clip", ["clip.loss=siglip"], "loss.logit_bias"),
        ("denoiser", [*DENOISER, "denoiser.loss={kind: uncertainty, channels: 8}"], "loss.weight"),
    ],
)
def test_parameters_of_a_loss_are_trained_resumed_and_not_exported(
    tmp_path: Path, stage: str, overrides: list[str], name: str
) -> None:
    at_once, resumed = tmp_path / "at_once", tmp_path / "resumed"
    for folder in (at_once, resumed):
        folder.mkdir()
    final = train(at_once, stage, *overrides)
    train(resumed, stage, *overrides, steps=2)
    begun = build_module(tiny_experiment(resumed, *overrides), stage).state_dict()[name]
    halfway = checkpoint(resumed, stage)["state_dict"][name]
    assert not torch.equal(halfway, begun)
    ours, expected = load_file(train(resumed, stage, *overrides)), load_file(final)
    assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []
    states = [checkpoint(folder, stage) for folder in (resumed, at_once)]
    assert torch.equal(states[0]["state_dict"][name], states[1]["state_dict"][name])
    assert not torch.equal(states[0]["state_dict"][name], halfway)
    assert not any(key.startswith("loss") for key in expected)
    assert not any(key.startswith("loss") for key in states[0]["ema"]["average"])


# Losses that read features: the loss of the default kind, plus the mean square of a module's output times a learned factor


class Penalty(nn.Module):
    """Base of the losses below, which counts its calls and keeps what it read."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.seen: list[tuple[str, torch.Size]] = []

    def penalty(self, features: Mapping[str, Tensor]) -> Tensor:
        self.seen += [(name, output.shape) for name, output in features.items()]
        (output,) = features.values()
        return self.factor * output.square().mean()


class VAEPenalty(Penalty, ReconstructionLoss):
    def forward(self, image: Tensor, reconstruction: Tensor, features: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(image, reconstruction) + self.penalty(features)


class CLIPPenalty(Penalty, CrossEntropy):
    def forward(self, *args: Any, features: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*args) + self.penalty(features)


class DenoiserPenalty(Penalty, WeightedLoss):
    def forward(self, *args: Any, features: Mapping[str, Tensor], **fixed: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        loss, sigma = super().forward(*args, **fixed)
        return loss + self.penalty(features), sigma


class VAEPenaltyConfig(AutoencoderLossConfig):
    features = ("encoder.mid",)

    def build(self) -> nn.Module:  # type: ignore[override]
        return VAEPenalty(self)


class CLIPPenaltyConfig(CrossEntropyConfig):
    features = ("image.projection",)

    def build(self) -> nn.Module:  # type: ignore[override]
        return CLIPPenalty()


class DenoiserPenaltyConfig(WeightedLossConfig):
    features = ("down.0",)

    def build(self) -> nn.Module:  # type: ignore[override]
        return DenoiserPenalty(self)


def with_loss(experiment: Experiment, stage: str, loss: Any) -> Experiment:
    return replace(experiment, **{stage: replace(getattr(experiment, stage), loss=loss)})


@pytest.mark.parametrize(
    ("stage", "loss", "attribute", "shape"),
    [
        ("vae", VAEPenaltyConfig(adversarial=0.5, disc_width=8, disc_layers=1), "reconstruction_loss", (4, 16, 8, 8)),
        ("clip", CLIPPenaltyConfig(), "loss", (4, 16)),
        ("denoiser", DenoiserPenaltyConfig(), "loss", (4, 16, 16, 16)),
    ],
)
def test_a_loss_reads_the_features_that_it_names(
    tmp_path: Path, stage: str, loss: Any, attribute: str, shape: tuple[int, ...]
) -> None:
    """In each training step, with gradients: the factor of the penalty is trained."""
    settings = ["max_steps=8", "validate_every=8", "learning_rate=1e-2", "gradient_clip=null", "batch_size=4"]
    experiment = with_loss(
        tiny_experiment(tmp_path, *DENOISER * (stage == "denoiser"), *(f"{stage}.train.{each}" for each in settings)),
        stage,
        loss,
    )
    module = build_module(experiment, stage)
    fit(module, data_of(experiment, module), experiment.trainer)
    built = getattr(module.task, attribute)
    assert set(built.seen) == {(loss.features[0], torch.Size(shape))}
    assert built.factor.item() != 1.0
    state = checkpoint(tmp_path, stage)["state_dict"]
    assert torch.equal(state[f"{attribute}.factor"], built.factor)


def test_nothing_is_captured_for_a_loss_that_reads_nothing(tmp_path: Path) -> None:
    for stage in ("vae", "clip"):
        task = build_module(tiny_experiment(tmp_path), stage).task
        assert not any(module._forward_hooks for module in task.modules())
        assert task.features.argument == {}


def test_a_feature_that_the_network_lacks_is_named(tmp_path: Path) -> None:
    class Misspelt(VAEPenaltyConfig):
        features = ("encoder.mdi",)

    experiment = with_loss(tiny_experiment(tmp_path), "vae", Misspelt())
    with pytest.raises(ConfigError, match=r"unknown feature 'encoder\.mdi'; did you mean 'encoder\.mid'"):
        build_module(experiment, "vae")


def test_the_losses_of_the_vae_train_their_own_network_alone(tmp_path: Path) -> None:
    """The loss of the autoencoder leaves no gradient in the discriminator, and the other way round."""
    task = build_module(tiny_experiment(tmp_path), "vae").task
    assert isinstance(task, VAETask)
    autoencoder, discriminator = task.optimizers()
    assert (autoencoder.start, discriminator.start) == (0, 2)
    batch = {"image": torch.rand(2, 3, 16, 16) * 2 - 1}
    first_step = list(task.losses(batch, Step(0, 0, torch.Generator())))
    assert len(first_step) == 1, "the discriminator has not begun"
    module = StageModule(task, TrainConfig(1, 1, 1e-3), {}, 0, tmp_path)
    optimizers = module.configure_optimizers()
    module._trainer = SimpleNamespace(optimizers=optimizers)  # type: ignore[assignment]
    losses = task.losses(batch, Step(2, 0, torch.Generator()))
    for index, (own, other) in enumerate(
        [(task.first_stage, task.discriminator), (task.discriminator, task.first_stage)]
    ):
        assert own is not None
        assert other is not None
        task.zero_grad()
        with module._only_trainable(index):
            next(losses).value.backward()
        assert all(parameter.grad is not None for parameter in own.parameters())
        assert all(parameter.grad is None for parameter in other.parameters())
        assert all(parameter.requires_grad for parameter in other.parameters())


def test_an_adversarial_loss_needs_a_first_stage_with_a_last_layer(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, "vae.model.kind=identity", "clip=null", *PIXELS[1:], *UNCONDITIONAL)
    with pytest.raises(
        ConfigError, match=r"vae.loss.adversarial is 0.5, but the first stage identity has no last layer"
    ):
        VAETask(experiment.vae)


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("clip", []),
        ("denoiser", [*DENOISER, "denoiser.loss=dispersive"]),
        (
            "denoiser",
            [*DENOISER, "denoiser.diffusion={schedule: flow, parametrization: flow}", "denoiser.loss=contrastive_flow"],
        ),
    ],
)
def test_a_loss_that_compares_samples_needs_several(tmp_path: Path, stage: str, overrides: list[str]) -> None:
    """With one sample it would have no gradient, or only be scaled, without a message."""
    with pytest.raises(TrainingError, match=f"compares the samples of a batch, .* set {stage}.train.batch_size to"):
        train(tmp_path, stage, *overrides, f"{stage}.train.batch_size=1")
