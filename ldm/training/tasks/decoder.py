"""Stage 4: distillation of a tiny decoder from the latents of a frozen first stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.config import config_field
from ldm.data.stream import EvaluationLoader
from ldm.errors import ConfigError
from ldm.formats import native
from ldm.formats.checkpoint import TINY_DECODER, Checkpoint
from ldm.image_output import Images
from ldm.nn.ranks import randn_rows
from ldm.training.config import TrainConfig
from ldm.training.tasks.task import Export, OptimizerSpec, Preview, Splits, Step, Task, TrainLoss, on_device
from ldm.vae import FirstStage, TinyDecoderConfig
from ldm.vae.metrics import psnr, ssim

if TYPE_CHECKING:
    from ldm.training.experiment import Experiment
    from ldm.training.handoff import Handoff

PREVIEW = 8
"""Number of images that are shown with their reconstructions."""

MIN_ERROR = 1e-5
"""Added to the squared errors of images in ``log_l2``, that of a PSNR of 56 dB, so that perfect images do not outweigh others."""


@dataclass(frozen=True)
class DistillationLossConfig:
    """Loss between an image and what the tiny decoder makes of its latent."""

    l1: float = config_field(0.25, "weight of the mean absolute error")
    l2: float = config_field(1.0, "weight of the mean squared error")
    log_l2: float = config_field(
        0.0, "weight of the mean logarithm of each image's mean squared error, which is the PSNR but for a factor"
    )

    def __post_init__(self) -> None:
        weights = self.l1, self.l2, self.log_l2
        if min(weights) < 0 or sum(weights) == 0:
            raise ConfigError("weights must not be negative, and l1, l2 or log_l2 must be above 0.")

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the loss of the ``difference [b c h w]`` of images in [-1, 1]: a scalar."""
        squares = difference.square().mean((1, 2, 3))
        logarithms = (squares + MIN_ERROR).log()
        return self.l1 * difference.abs().mean() + self.l2 * squares.mean() + self.log_l2 * logarithms.mean()


@dataclass(frozen=True)
class DecoderStage:
    """Stage 4: the tiny decoder, and how it is trained."""

    model: TinyDecoderConfig = config_field(help="tiny decoder")
    train: TrainConfig = config_field(help="training of the stage")
    loss: DistillationLossConfig = config_field(DistillationLossConfig(), "distillation loss", changeable=True)


class DecoderTask(Task):
    """Regression of images from samples of the first stage's posterior; the first stage is frozen."""

    stage = "decoder"
    title = "Tiny decoder"
    result = Path("decoder/final.safetensors")
    monitor = "psnr"
    higher_is_better = True

    def __init__(self, config: DecoderStage, first_stage: FirstStage):
        super().__init__()
        self.config = config
        self.first_stage = first_stage.requires_grad_(False)
        self.decoder = config.model.build()

    @classmethod
    def build(cls, experiment: Experiment, handoff: Handoff) -> DecoderTask:
        task = cls.outline(experiment, ())
        handoff.load_first_stage(task.first_stage)
        return task

    @classmethod
    def outline(cls, experiment: Experiment, captions: Sequence[str]) -> DecoderTask:
        assert experiment.decoder is not None
        return cls(experiment.decoder, experiment.vae.model.build())

    @classmethod
    def parts_of(cls, source: Checkpoint) -> Sequence[str]:
        return [TINY_DECODER]

    @property
    def trainable_module(self) -> nn.Module:
        return self.decoder

    @property
    def frozen_first_stage(self) -> FirstStage:
        return self.first_stage

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"tiny decoder": self.decoder, "first stage": self.first_stage}

    @property
    def parts(self) -> Mapping[str, str]:
        return {TINY_DECODER: ""}

    def optimizers(self) -> Sequence[OptimizerSpec]:
        return [OptimizerSpec("loss", (self.decoder,))]

    @property
    def called_modules(self) -> Sequence[nn.Module]:
        return [self.decoder]

    def losses(self, batch: Mapping[str, Any], step: Step) -> Iterator[TrainLoss]:
        image = batch["image"]
        with torch.no_grad():
            posterior = self.first_stage.posterior(batch)
            noise = randn_rows(posterior.mode.shape, step.generator).to(posterior.mode)
            latent = self.first_stage.normalize(posterior.sample(noise))
        yield TrainLoss(self.config.loss(self.decoder(latent).float() - image))

    def evaluate(self, batch: Mapping[str, Any], step: Step) -> Mapping[str, Tensor]:
        """Return PSNR and SSIM of each image, decoded from the mode of its posterior by the tiny and the full decoder."""
        image = batch["image"]
        full, tiny = self._decoded(batch)
        return {"psnr": psnr(image, tiny), "ssim": ssim(image, tiny), "psnr_full": psnr(image, full)}

    def metrics(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: float(values.double().mean()) for name, values in results.items()}

    def previews(self, splits: Splits, step: Step) -> Mapping[str, Preview]:
        """Return validation images, and below them what the full and the tiny decoder make of their latents."""
        batch = on_device(next(iter(EvaluationLoader(splits("val"), PREVIEW))), self.device)
        rows = torch.cat([batch["image"], *self._decoded(batch)])
        return {"decoded": Images.of((rows + 1) / 2).grid(columns=len(batch["image"]))}

    def export(self) -> Export:
        return Export(native.DECODER, self.decoder, self.config.model)

    def _decoded(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the images ``[b c h w]`` that the full and the tiny decoder make of the modes of the posteriors."""
        latent = self.first_stage.posterior(batch).mode
        full, tiny = self.first_stage.decode(latent), self.decoder(self.first_stage.normalize(latent))
        return full.float().clamp(-1, 1), tiny.float().clamp(-1, 1)
