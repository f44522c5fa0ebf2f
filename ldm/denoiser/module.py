"""Stage 3: training of the denoiser, and of the conditioner where it is trained along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import ConditionerConfig
from ldm.config import config_field
from ldm.data.stream import EvaluationLoader
from ldm.denoiser.config import DenoiserConfig
from ldm.diffusion.loss import DenoisingLoss
from ldm.diffusion.noise_level_samplers import Stratified
from ldm.diffusion.parametrization import Diffusion
from ldm.image_output import Images
from ldm.modalities.arguments import of_key, pipeline_arguments
from ldm.model import LatentDiffusion, SamplingConfig
from ldm.pipeline import Pipeline
from ldm.training.optim import TrainConfig
from ldm.training.stage import Picture, StageModule
from ldm.training.toy_plots import process_pictures, require_matplotlib

BINS = 5
"""Equal parts of the schedule by which the validation loss is reported."""

PREVIEW = 8
"""Samples that are shown of an unconditional model, and of one that works on images."""

POINTS = 2000
"""Points that are shown of a two-dimensional model."""

LEAST_SIDE = 64
"""Pixels to which samples are enlarged where they are smaller."""


@dataclass(frozen=True)
class DenoiserStage:
    """Stage 3: network, conditioner and diffusion, and how they are trained."""

    model: DenoiserConfig = config_field(help="the network")
    conditioner: ConditionerConfig = config_field(help="what it listens to")
    train: TrainConfig = config_field(help="its training")
    diffusion: Diffusion = config_field(Diffusion(), "schedule and parametrization")
    loss: DenoisingLoss = config_field(DenoisingLoss(), "the weighted denoising loss")
    sampling: SamplingConfig = config_field(SamplingConfig(), "how the trained model is sampled by default")
    prompts: tuple[str, ...] = config_field((), "prompts of the grids made while training")
    classes: tuple[int, ...] = config_field((), "class labels of the grids made while training")


class DenoiserModule(StageModule):
    """The denoising loss on latents; first stage frozen, conditioner frozen or trained along."""

    stage = "denoiser"
    monitor = "loss"
    higher_is_better = False

    def __init__(
        self,
        config: DenoiserStage,
        model: LatentDiffusion,
        handoff: Mapping[str, str],
        seed: int,
        folder: Path,
    ):
        super().__init__(config.train, handoff, seed, folder)
        self.config = config
        self.model = model
        model.first_stage.requires_grad_(False)
        self.of_points = model.latent_shape() == (2, 1, 1)
        if self.of_points:
            require_matplotlib()

    def trainable_module(self) -> nn.Module:
        return self.model

    def compile_networks(self) -> None:
        self.model.denoiser.compile()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        generator = self.step_generator(batch_idx)
        batch = self._conditions(batch, generator)
        cond = self.model.conditioner(batch, generator)
        loss, _ = self.config.loss(
            self.model.denoiser, self.model.diffusion, self._latents(batch, generator), cond, generator
        )
        return self.report(loss.mean())

    def _conditions(self, batch: Mapping[str, Any], generator: torch.Generator) -> Mapping[str, Any]:
        """The batch with the raw conditions that it lacks, and with those that are made from its images."""
        defaults = self.model.config.conditioner.defaults(*self.model.config.size)
        batch = {**{name: [pair] * len(batch["key"]) for name, pair in defaults.items()}, **batch}
        with torch.no_grad():
            return self.model.conditioner.prepare_batch(batch, self.model.encode, generator)

    def _latents(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Normalised latents, sampled from the posteriors of cached latents or of images encoded here."""
        with torch.no_grad():
            posterior = self.model.first_stage.posterior(batch)
            noise = torch.randn(posterior.mode.shape, generator=generator).to(posterior.mode)
            return self.model.first_stage.normalize(posterior.sample(noise))

    # Validation: fixed noise at stratified levels, so that two numbers differ by the weights alone

    def on_validation_epoch_start(self) -> None:
        self._losses: list[Tensor] = []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        generator = self.generator("validation", batch_idx, self.global_rank)
        batch = self._conditions(batch, generator)
        x0 = self._latents(batch, generator)
        schedule = self.model.diffusion.schedule
        sigma = Stratified().sample(len(x0), schedule, generator)
        noise = torch.randn(x0.shape, generator=generator)
        cond = self.model.conditioner(batch)
        loss, sigma = self.config.loss(self.model.denoiser, self.model.diffusion, x0, cond, sigma=sigma, noise=noise)
        share = schedule.t(sigma.cpu()) / schedule.num_timesteps
        self._losses.append(torch.stack([(share * BINS).long().clamp(max=BINS - 1).double(), loss.double().cpu()]))

    def on_validation_epoch_end(self) -> None:
        bins, losses = torch.cat(self._losses, dim=1)
        sums = torch.zeros(2, BINS, dtype=torch.float64)
        sums[0].index_add_(0, bins.long(), losses)
        sums[1].index_add_(0, bins.long(), torch.ones_like(losses))
        sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()
        self.validation = {"loss": float(sums[0].sum() / sums[1].sum())}
        for i, (total, count) in enumerate(sums.T.tolist()):
            if count:
                self.validation[f"loss_{100 * i // BINS}_{100 * (i + 1) // BINS}"] = total / count

    def pictures(self) -> Mapping[str, Picture]:
        """Samples from fixed noise: for fixed prompts or classes, or for what the first images of val tell the model.

        Of points, the forward and the reverse process.
        """
        if self.of_points:
            points = next(iter(EvaluationLoader(self.data.samples("val"), POINTS)))["image"]
            return process_pictures(self.model, points.to(self.device), self.generator("pictures"))
        reads = self.config.conditioner.input_keys
        wanted: dict[str, Any] = {"num_images_per_prompt": PREVIEW}
        if reads and reads not in (("text",), ("label",)):
            return {"samples": self._beside_the_truth(reads)}
        if reads:
            wanted = {"prompt": self.config.prompts} if reads == ("text",) else {"label": self.config.classes}
        if not all(wanted.values()):
            return {}
        samples = Pipeline(self.model)(**wanted, seed=self.seed, progress=False)
        scale = max(1, LEAST_SIDE // samples[0].height)
        return {"samples": samples.grid(captions=bool(reads), scale=scale)}

    def _beside_the_truth(self, reads: tuple[str, ...]) -> Picture:
        """Of validation images, from above: what the model is given of them, what it makes of that, and they themselves."""
        batch = next(iter(EvaluationLoader(self.data.samples("val"), PREVIEW)))
        batch = self.data.transfer_batch_to_device(batch, self.device, 0)
        told = self._conditions(batch, self.generator("pictures"))
        arguments = pipeline_arguments({name: _entries(told[name]) for name in reads})
        made = Pipeline(self.model)(**arguments, seed=self.seed, output_type="pt", progress=False)
        if "image" in batch:
            truth = batch["image"]
        else:
            latent = self.model.first_stage.posterior(batch).mode
            truth = self.model.decode(self.model.first_stage.normalize(latent))
        shown = (of_key(name).preview(told[name], truth) for name in reads)
        given = [images for images in shown if images is not None]
        rows = (torch.cat([*given, 2 * made - 1, truth]) + 1) / 2
        return Images.of(rows).grid(columns=len(truth), scale=max(1, LEAST_SIDE // truth.shape[-2]))


def _entries(values: Any) -> list[Any]:
    """An entry for each image; numbers as such, not as tensors."""
    return values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else list(values)
