"""Stage 1: training of the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from ldm.config import config_field
from ldm.image_output import Images
from ldm.training.optim import TrainConfig, adamw
from ldm.training.stage import StageModule
from ldm.vae.discriminator import PatchDiscriminator
from ldm.vae.first_stage import FirstStageConfig, HasLastLayer
from ldm.vae.loss import AutoencoderLossConfig, ReconstructionLoss, adaptive_weight, hinge_loss

PREVIEW = 8
"""Pictures that are shown beside their reconstructions."""


@dataclass(frozen=True)
class VAEStage:
    """Stage 1: the first stage, how it is trained, or the file that it comes from."""

    model: FirstStageConfig = config_field(help="the first stage")
    loss: AutoencoderLossConfig = config_field(AutoencoderLossConfig(), "its losses")
    train: TrainConfig | None = config_field(None, "its training; null = it is not trained here")
    checkpoint: str | None = config_field(
        None, "source of a first stage that is only used: a file, folder or hub id, also of SD"
    )


class VAEModule(StageModule):
    """Autoencoder against discriminator: two optimizers, stepped by hand one after the other on the same batch."""

    stage = "vae"
    monitor = "psnr"
    higher_is_better = True

    def __init__(self, config: VAEStage, train: TrainConfig, seed: int, folder: Path):
        super().__init__(train, {}, seed, folder)
        self.config = config
        self.automatic_optimization = False
        self.loss_config = config.loss
        self.first_stage = config.model.build()
        self.reconstruction_loss = ReconstructionLoss(config.loss)
        self.discriminator: PatchDiscriminator | None = None
        if config.loss.adversarial:
            channels = config.model.image_channels
            self.discriminator = PatchDiscriminator(channels, config.loss.disc_width, config.loss.disc_layers)
        self.preview: Tensor | None = None

    def trainable_module(self) -> nn.Module:
        return self.first_stage

    def compile_networks(self) -> None:
        self.first_stage.compile_networks()

    def configure_optimizers(self) -> Any:
        modules = [self.first_stage] + ([self.discriminator] if self.discriminator else [])
        return [adamw([module], self.train_config) for module in modules]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        image, config = batch["image"], self.loss_config
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]  # Lightning hands out one, or a list of several
        self.toggle_optimizer(optimizers[0])  # the discriminator's weights get no gradients
        generator = self.step_generator(batch_idx)
        posterior = self.first_stage.encode(image)
        latent = posterior.sample(torch.randn(posterior.mode.shape, generator=generator).to(image))
        reconstruction = self.first_stage.decode(latent)

        error = self.reconstruction_loss(image, reconstruction.float()).mean()
        loss = error + config.kl * posterior.regularization().mean()
        metrics: dict[str, Tensor] = {
            "error": error.detach() / image[0].numel(),
            **posterior.metrics(posterior.sums(), len(image)),
        }
        discriminator = self.discriminator if self.completed_steps >= config.disc_start else None
        if discriminator is not None:
            fooled = -discriminator(reconstruction).mean()
            assert isinstance(self.first_stage, HasLastLayer)
            weight = config.adversarial * adaptive_weight(error, fooled, self.first_stage.last_layer)
            loss = loss + weight * fooled
            metrics["generator"] = fooled.detach()
        self.first_stage.update(posterior)
        self._step(optimizers[0], self.report(loss / image[0].numel(), **metrics), batch_idx)
        self.untoggle_optimizer(optimizers[0])

        if discriminator is not None:
            self.toggle_optimizer(optimizers[1])
            loss_d = hinge_loss(discriminator(image), discriminator(reconstruction.detach()))
            self.latest["discriminator"] = loss_d.detach()
            self._step(optimizers[1], loss_d, batch_idx)
            self.untoggle_optimizer(optimizers[1])
        return loss.detach()

    def _step(self, optimizer: Any, loss: Tensor, batch_index: int) -> None:
        """Gradients of ``loss``, accumulated; clipped and applied where a step is due."""
        self.manual_backward(loss / self.train_config.accumulate)
        if self.is_optimizer_step(batch_index):
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        # Not sooner: in fp16 the gradients are scaled until here.
        self.clip_gradients(optimizer, self.train_config.gradient_clip, "norm")

    # Validation

    def on_validation_epoch_start(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        image = batch["image"]
        if self.preview is None:
            self.preview = image[:PREVIEW]
        posterior = self.first_stage.encode(image)
        reconstruction = self.first_stage.decode(posterior.mode).float().clamp(-1, 1)
        similarity: Any = ssim(reconstruction, image, data_range=(-1.0, 1.0), reduction="sum")
        sums = {
            "psnr": psnr(image, reconstruction).sum(),
            "ssim": similarity,
            "images": torch.tensor(len(image)),
            **posterior.sums(),
        }
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.double().cpu()

    def on_validation_epoch_end(self) -> None:
        sums = {
            name: self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum").cpu()
            for name, value in self._sums.items()
        }
        images = int(sums["images"])
        metrics = self.first_stage.posterior_type.metrics(sums, images)
        self.validation = {name: float(sums[name] / images) for name in ("psnr", "ssim")} | {
            name: float(value) for name, value in metrics.items()
        }

    def pictures(self) -> Mapping[str, Any]:
        """Validation images above their reconstructions."""
        if self.preview is None:
            self.preview = next(iter(self.data.val_dataloader()))["image"][:PREVIEW].to(self.device)
        reconstruction = self.first_stage.decode(self.first_stage.encode(self.preview).mode)
        pairs = torch.cat([self.preview, reconstruction.clamp(-1, 1)])
        return {"reconstructions": Images.of((pairs + 1) / 2).grid(columns=len(self.preview))}


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image ``[b c h w]`` in [-1, 1]: ``[b]``; the peak is the range, 2."""
    error = (image - reconstruction).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp(min=1e-10))
