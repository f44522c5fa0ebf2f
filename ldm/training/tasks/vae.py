"""Stage 1: training of the first stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from ldm.config import config_field
from ldm.data.stream import EvaluationLoader
from ldm.errors import ConfigError
from ldm.formats import native, read
from ldm.formats.checkpoint import Checkpoint
from ldm.formats.training_checkpoint import resume_points
from ldm.image_output import Images
from ldm.nn.ranks import randn_rows, sum_over_ranks
from ldm.training.config import TrainConfig
from ldm.training.tasks.image_towers import image_tower
from ldm.training.tasks.task import (
    FIRST_STAGE,
    Export,
    Features,
    OptimizerSpec,
    Preview,
    Splits,
    Step,
    Task,
    TrainLoss,
    on_device,
)
from ldm.vae.first_stage import FirstStageConfig, HasLastLayer
from ldm.vae.loss import AutoencoderLossConfig, GeneratorLoss, VAELossConfig, adaptive_weight, hinge_loss
from ldm.vae.metrics import measure_latents, psnr, ssim
from ldm.vae.terms import LossTerm, LossTermConfig

if TYPE_CHECKING:
    from ldm.training.experiment import Experiment
    from ldm.training.handoff import Handoff

PREVIEW = 8
"""Number of images that are shown with their reconstructions."""


@dataclass(frozen=True)
class VAEStage:
    """Stage 1: the first stage, and its training or the source that it is loaded from."""

    model: FirstStageConfig = config_field(help="first stage")
    loss: VAELossConfig = config_field(AutoencoderLossConfig(), "losses of the first stage", changeable=True)
    train: TrainConfig | None = config_field(None, "training of the stage; null = it is not trained")
    checkpoint: str | None = config_field(
        None,
        "source of a first stage that is used without training: a file, folder or hub id, also of SD",
        changeable=True,
        path=True,
    )
    freeze: Literal["encoder"] | None = config_field(
        None, "encoder = train the decoder of train.init alone; its latents and their statistics stay as they are"
    )

    def __post_init__(self) -> None:
        for term in self.loss.terms:
            term.check_model(self.model)
            if self.freeze and term.trains_encoder:
                raise ConfigError(
                    f"loss.terms contains {term.kind}, which trains the encoder, but freeze is encoder; remove one."
                )
        if self.freeze and not self.model.has_weights:
            raise ConfigError(f"freeze is encoder, but the first stage {self.model.kind} has none; set it to null.")
        if self.freeze and self.train is not None and self.train.init is None:
            raise ConfigError(
                "freeze is encoder, but train.init does not name the first stage whose decoder is trained."
            )


class VAETask(Task):
    """Autoencoder against discriminator: two optimizers, one after the other on the same batch."""

    stage = "vae"
    title = "VAE"
    result = Path("vae/final.safetensors")
    monitor = "psnr"
    higher_is_better = True

    def __init__(self, config: VAEStage):
        super().__init__()
        self.config = config
        self.first_stage = config.model.build()
        self.reconstruction_loss = config.loss.build()
        towers = {each.kind: _image_tower(each) for each in config.loss.terms}
        self.image_towers = {f"vae.loss.terms.{kind}": tower for kind, tower in towers.items() if tower is not None}
        self.terms = nn.ModuleDict({each.kind: each.build(towers[each.kind]) for each in config.loss.terms})
        self.discriminator = config.loss.build_discriminator(config.model.image_channels)
        self.discriminator_step = config.loss.discriminator_step(config.train.max_steps if config.train else 0)
        self.features = Features(self.first_stage, config.loss.features)
        for module in self.first_stage.encoding_modules if config.freeze else ():
            module.requires_grad_(False)
        if self.discriminator is not None and not isinstance(self.first_stage, HasLastLayer):
            raise ConfigError(
                f"vae.loss.adversarial is {config.loss.adversarial}, but the first stage {config.model.kind} has no last layer "
                "to balance the adversarial loss by; set it to 0."
            )

    @classmethod
    def build(cls, experiment: Experiment, handoff: Handoff) -> VAETask:
        task, config = cls(experiment.vae), experiment.vae
        if config.freeze and not resume_points(experiment.folder / cls.stage):
            assert config.train is not None
            assert config.train.init is not None
            handoff.load_part(read(config.train.init), FIRST_STAGE, task.first_stage)
        return task

    @classmethod
    def outline(cls, experiment: Experiment, captions: Sequence[str]) -> VAETask:
        return cls(experiment.vae)

    @classmethod
    def parts_of(cls, source: Checkpoint) -> Sequence[str]:
        return [FIRST_STAGE]

    @property
    def trainable_module(self) -> nn.Module:
        return self.first_stage

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        others: dict[str, nn.Module] = {} if self.discriminator is None else {"discriminator": self.discriminator}
        for config in self.config.loss.terms:
            if config.image_encoder is not None:
                others[f"image tower of {config.kind}"] = self.terms[config.kind]
        return {"first stage": self.first_stage, **others}

    @property
    def parts(self) -> Mapping[str, str]:
        return {FIRST_STAGE: ""}

    def optimizers(self) -> Sequence[OptimizerSpec]:
        autoencoder = OptimizerSpec("loss", (self.first_stage, self.reconstruction_loss, self.terms))
        if self.discriminator is None:
            return [autoencoder]
        return [autoencoder, OptimizerSpec("discriminator", (self.discriminator,), self.discriminator_step)]

    @property
    def called_modules(self) -> Sequence[nn.Module]:
        return self.first_stage.called_modules

    def compile_networks(self) -> None:
        if self.discriminator is not None:
            # The adaptive weight differentiates the decoder before the step does, so its graph has to keep what it saved.
            functorch.donated_buffer = False
        super().compile_networks()

    @property
    def unsharded(self) -> Sequence[nn.Parameter]:
        stage = self.first_stage
        return [cast(nn.Parameter, stage.last_layer)] if isinstance(stage, HasLastLayer) else []

    def losses(self, batch: Mapping[str, Any], step: Step) -> Iterator[TrainLoss]:
        image, config = batch["image"], self.config.loss
        with torch.no_grad() if self.config.freeze else nullcontext():
            posterior = self.first_stage.encode(image)
        latent = posterior.sample(randn_rows(posterior.mode.shape, step.generator).to(image))
        target = image
        for _, term in self._terms():
            target, latent = term.transform(target, latent, step.of_all_ranks or step.generator)
        reconstruction = self.first_stage.decode(latent)

        rec_loss, metrics = self._reconstruction_loss(target, reconstruction.float(), image)
        loss = rec_loss + config.kl * posterior.regularization().mean()
        sums = {name: sum_over_ranks(value) for name, value in posterior.sums().items()}
        metrics |= {
            "error": rec_loss.detach() / image[0].numel(),
            **posterior.metrics(sums, len(image) * step.world_size),
        }
        discriminator = self.discriminator if step.number >= self.discriminator_step else None
        if discriminator is not None:
            discriminator.requires_grad_(True)  # its own loss, below, takes the same logits
            g_loss, logits = GeneratorLoss.of(discriminator, reconstruction)
            weight = config.adversarial * adaptive_weight(
                rec_loss, g_loss, cast(HasLastLayer, self.first_stage).last_layer
            )
            loss = loss + weight * g_loss
            metrics["generator"] = g_loss.detach()
        if not self.config.freeze:
            self.first_stage.update(posterior)
        yield TrainLoss(loss / image[0].numel(), metrics)
        if discriminator is not None:
            yield self._discriminator_loss(discriminator, target, logits)

    def _terms(self) -> Iterator[tuple[LossTermConfig, LossTerm]]:
        """Yield the config and the module of each additional term."""
        return ((config, cast(LossTerm, self.terms[config.kind])) for config in self.config.loss.terms)

    def _reconstruction_loss(
        self, target: Tensor, reconstruction: Tensor, image: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss of reconstructions of ``target [b c h w]``, per image, and the distance of each additional term.

        The loss is a sum over the values of an image of the size of ``image``; the size of ``target`` may be another.
        """
        loss = self.reconstruction_loss(target, reconstruction, **self.features.argument).mean()
        values = target[0].numel()
        metrics: dict[str, Tensor | float] = {}
        for config, term in self._terms():
            distance = term.distance(target, reconstruction)
            if distance is not None:  # added to the error of each value, as LPIPS is
                loss = loss + config.weight * distance.mean() * values
                metrics[config.kind] = distance.detach().mean()
        if values != image[0].numel():
            loss = loss * (image[0].numel() / values)
        return loss, metrics

    def _discriminator_loss(self, discriminator: nn.Module, image: Tensor, fake: Tensor) -> TrainLoss:
        """Return the loss of the discriminator for real images, and its logits ``fake`` for reconstructions."""
        if any(config.needs_gradients for config, _ in self._terms()):
            image = image.detach().requires_grad_()
        real, metrics = discriminator(image), {}
        loss = hinge_loss(real, fake)
        for config, term in self._terms():
            value = term.discriminator_loss(image, real, fake)
            if value is not None:
                loss = loss + config.weight * value
                metrics[config.kind] = value.detach()
        return TrainLoss(loss, metrics)

    def evaluate(self, batch: Mapping[str, Any], step: Step) -> Mapping[str, Tensor]:
        """Return sums over the batch, ``[1 ...]`` each: of PSNR and SSIM, the number of images, and those of the posterior."""
        image = batch["image"]
        posterior = self.first_stage.encode(image)
        reconstruction = self.first_stage.decode(posterior.mode).float().clamp(-1, 1)
        sums = {
            "psnr": psnr(image, reconstruction).sum(),
            "ssim": ssim(image, reconstruction).sum(),
            "images": torch.tensor(len(image), device="cpu"),
        }
        return {name: value.double()[None] for name, value in {**sums, **posterior.sums()}.items()}

    def metrics(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        sums = {name: values.sum(0).cpu() for name, values in results.items()}
        images = int(sums["images"])
        means = {name: sums[name] / images for name in ("psnr", "ssim")}
        means |= self.first_stage.posterior_type.metrics(sums, images)
        return {name: float(value) for name, value in means.items()}

    def previews(self, splits: Splits, step: Step) -> Mapping[str, Preview]:
        """Return validation images above their reconstructions."""
        image = on_device(next(iter(EvaluationLoader(splits("val"), PREVIEW))), self.device)["image"]
        reconstruction = self.first_stage.decode(self.first_stage.encode(image).mode)
        pairs = torch.cat([image, reconstruction.clamp(-1, 1)])
        return {"reconstructions": Images.of((pairs + 1) / 2).grid(columns=len(image))}

    def finish(self, splits: Splits) -> None:
        """Measure the latents of the training images, which the next stage normalizes by.

        Those of a frozen encoder keep the statistics that they have, if they were measured before.
        """
        assert self.config.train is not None
        stage = self.first_stage
        if self.config.freeze and not (bool((stage.latent_mean == 0).all()) and bool((stage.latent_std == 1).all())):
            return
        batches = EvaluationLoader(splits("train"), self.config.train.batch_size, bucketed=True)
        measure_latents(self.first_stage, batches, self.device)

    def export(self) -> Export:
        return Export(native.FIRST_STAGE, self.first_stage, self.config.model)


def _image_tower(term: LossTermConfig) -> nn.Module | None:
    """Build the image tower that a term of the loss uses, if it uses one."""
    return None if term.image_encoder is None else image_tower(term.image_encoder, "vae.loss.terms")
