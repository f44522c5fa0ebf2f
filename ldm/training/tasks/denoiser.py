"""Stage 3: training of the denoiser, and of the conditioner if it is trainable."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer, TokenizerConfig, train_byte_bpe
from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.conditioning.conditioner import input_of
from ldm.conditioning.label import ClassConditioner
from ldm.config import config_field
from ldm.data.samples import Samples
from ldm.data.stream import EvaluationLoader
from ldm.data.teacher import TEACHER, Teacher
from ldm.denoiser.config import DenoiserConfig
from ldm.diffusion.loss import DenoisingLossConfig, WeightedLossConfig
from ldm.diffusion.noise_level_samplers import Stratified
from ldm.diffusion.parametrization import Diffusion
from ldm.errors import ConditionError, ConfigError, TrainingError
from ldm.formats import MODEL_FILE, native
from ldm.formats.checkpoint import Checkpoint, part_prefixes
from ldm.image_output import Images
from ldm.modalities.arguments import of_key, pipeline_arguments
from ldm.modalities.label import LABEL
from ldm.model import LatentDiffusion, SamplingConfig
from ldm.nn.ranks import draw_rows, randn_rows
from ldm.nn.token_routing import shares_by_level
from ldm.pipeline import Pipeline
from ldm.training import noise_level_bins
from ldm.training.config import TrainConfig
from ldm.training.tasks.image_towers import teacher_of
from ldm.training.tasks.task import (
    DENOISER,
    FIRST_STAGE,
    IMAGE_ENCODER,
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
from ldm.training.toy_plots import process_plots, require_matplotlib
from ldm.vae import FirstStage

if TYPE_CHECKING:
    from ldm.training.experiment import Experiment
    from ldm.training.handoff import Handoff

BINS = 5
"""Number of equal parts of the schedule for which the validation loss is reported."""

PREVIEW = 8
"""Number of generated images in the previews of an unconditional model, and of one that is conditioned on images."""

POINTS = 2000
"""Number of points in the previews of a two-dimensional model."""

LEAST_SIDE = 64
"""Height in pixels to which smaller generated images are enlarged."""


@dataclass(frozen=True)
class DenoiserStage:
    """Stage 3: network, conditioner and diffusion, and how they are trained."""

    model: DenoiserConfig = config_field(help="denoising network")
    conditioner: ConditionerConfig = config_field(help="what the denoiser is conditioned on")
    train: TrainConfig = config_field(help="training of the stage")
    diffusion: Diffusion = config_field(Diffusion(), "schedule and parametrization")
    loss: DenoisingLossConfig = config_field(WeightedLossConfig(), "denoising loss", changeable=True)
    token_routing: float | tuple[float, ...] = config_field(
        0.0,
        "share of the positions that skip the transformer blocks in training (TREAD); a list gives that of each level, the "
        "finest first",
        changeable=True,
    )
    sampling: SamplingConfig = config_field(SamplingConfig(), "default sampling of the trained model", changeable=True)
    prompts: tuple[str, ...] = config_field((), "prompts of the image grids made during training", changeable=True)
    classes: tuple[int, ...] = config_field((), "class labels of the image grids made during training", changeable=True)

    def __post_init__(self) -> None:
        _ = self.routed_shares  # raises if they do not fit the network

    @property
    def routed_shares(self) -> tuple[float, ...]:
        """Share of the positions that skip the transformer blocks in training, for each level of the network."""
        return shares_by_level(self.token_routing, self.model.transformer_depths)


class DenoiserTask(Task):
    """Denoising loss on latents; the first stage is frozen, the conditioner frozen or trained with the denoiser."""

    stage = "denoiser"
    title = "Denoiser"
    result = Path(MODEL_FILE)
    monitor = "loss"
    higher_is_better = False
    needs_images = False

    def __init__(self, config: DenoiserStage, model: LatentDiffusion, image_encoder: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.model = model
        if any(config.routed_shares):
            cast(Any, model.denoiser).set_token_routing(config.routed_shares)
        model.first_stage.requires_grad_(False)
        self.features = Features(model.denoiser, config.loss.features)
        self.loss = self._loss(image_encoder)
        self.image_towers = {} if image_encoder is None else {"denoiser.loss": image_encoder}
        self.of_points = model.latent_shape() == (2, 1, 1)
        if self.of_points:
            require_matplotlib()

    @classmethod
    def build(cls, experiment: Experiment, handoff: Handoff) -> DenoiserTask:
        """Build the model with the first stage and the encoders of conditions of the preceding stages."""
        clip = None if experiment.clip is None else handoff.predecessor("clip")
        config = experiment.model_config
        conditioner = config.conditioner.with_tokenizer(handoff.tokenizer)
        model = LatentDiffusion(replace(config, conditioner=conditioner), None if clip is None else clip.tokenizer)
        load_encoders(handoff, clip, model.first_stage, model.conditioner)
        return cls(experiment.denoiser, model, image_encoder_of(experiment, handoff, clip))

    @classmethod
    def outline(cls, experiment: Experiment, captions: Sequence[str]) -> DenoiserTask:
        # The tokenizers of the run may not exist yet; any tokenizer with the same number of tokens suffices.
        clip = None if experiment.clip is None else _any_tokenizer(experiment.clip.tokenizer)
        config = experiment.model_config
        conditioner = config.conditioner.with_tokenizer(lambda tokenizer, _: _any_tokenizer(tokenizer))
        model = LatentDiffusion(replace(config, conditioner=conditioner), clip)
        return cls(experiment.denoiser, model.to("meta"), image_encoder_of(experiment))

    def _loss(self, image_encoder: nn.Module | None) -> nn.Module:
        """Build the loss, with the image tower that one that reads images compares the denoiser with."""
        config = self.config.loss
        if not config.reads_images:
            return config.build()
        assert image_encoder is not None
        try:
            return config.build_aligned(self.features.channels(), image_encoder)
        except ConfigError as error:
            raise ConfigError(f"denoiser.loss: {error}") from None

    @classmethod
    def parts_of(cls, source: Checkpoint) -> Sequence[str]:
        return [FIRST_STAGE, DENOISER, *source.encoders()]

    @property
    def trainable_module(self) -> nn.Module:
        return self.model

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        model = self.model
        networks = {"denoiser": model.denoiser, "first stage": model.first_stage, "conditioner": model.conditioner}
        kind = self.config.loss.kind
        return networks | ({f"loss {kind}, with its teacher": self.loss} if self.config.loss.reads_images else {})

    @property
    def parts(self) -> Mapping[str, str]:
        return part_prefixes(self.model)

    @property
    def frozen_first_stage(self) -> FirstStage | None:
        return self.model.first_stage if self.model.config.first_stage.has_weights else None

    @property
    def teacher(self) -> Teacher | None:
        if not self.image_towers:
            return None
        loss: Any = self.loss
        return Teacher(loss.encoder, loss.layer)

    def optimizers(self) -> Sequence[OptimizerSpec]:
        return [OptimizerSpec("loss", (self.model, self.loss))]

    @property
    def called_modules(self) -> Sequence[nn.Module]:
        encoders = (encoder for _, encoder in self.model.conditioner.pretrained_encoders())
        return [self.model.denoiser, *(each for each in encoders if any(p.requires_grad for p in each.parameters()))]

    @property
    def leaves_out_parameters(self) -> bool:
        return len(self.called_modules) > 1  # an encoder, of which the conditioner may read one output alone

    def check_batch_size(self, size: int) -> None:
        loss = self.config.loss
        if loss.compares_samples and size < 2:
            raise TrainingError(
                f"denoiser.loss is {loss.kind}, which compares the samples of a batch, but the batches have one; set "
                "denoiser.train.batch_size to at least 2."
            )

    def losses(self, batch: Mapping[str, Any], step: Step) -> Iterator[TrainLoss]:
        generator = step.generator
        batch = self._conditions(batch, generator)
        with _naming_sample(batch["key"]):
            cond = self.model.conditioner(batch, generator)
        x0, model = self._latents(batch, generator), self.model
        share = model.config.denoiser.self_conditioning
        shared = step.of_all_ranks or generator  # all ranks have to evaluate their networks equally often
        estimates = share > 0 and float(torch.rand((), generator=shared, device=shared.device)) < share
        self_condition = model.with_estimate if estimates else None
        options = {**self.features.argument, **self._features_of(batch), "self_condition": self_condition}
        loss, sigma = self.loss(model.denoiser, model.diffusion, x0, cond, generator, **options)
        yield TrainLoss(loss.mean(), by_noise_level={"loss": (loss.detach(), sigma)})

    def _features_of(self, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the argument of a loss that reads images: the teacher's features of them, stored or computed here."""
        if self.teacher is None:
            return {}
        return {"teacher": batch[TEACHER] if TEACHER in batch else self.teacher.encode(batch["image"])}

    def _conditions(self, batch: Mapping[str, Any], generator: torch.Generator) -> Mapping[str, Any]:
        """Return the batch with default values of missing raw conditions, and with those that are made from its images."""
        defaults = self.model.config.conditioner.defaults(*self._image_size(batch))
        batch = {**{name: [pair] * len(batch["key"]) for name, pair in defaults.items()}, **batch}
        with torch.no_grad():
            return self.model.conditioner.prepare_batch(batch, self.model.encode, generator)

    def _image_size(self, batch: Mapping[str, Any]) -> Sequence[int]:
        """Return height and width of the images of a batch, which may be that of an aspect bucket."""
        if "image" in batch:
            return batch["image"].shape[-2:]
        factor = self.model.first_stage.factor
        return [factor * side for side in self.model.first_stage.posterior(batch).mode.shape[-2:]]

    def _latents(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Sample normalized latents from the posteriors of cached latents or of images encoded here."""
        with torch.no_grad():
            posterior = self.model.first_stage.posterior(batch)
            noise = randn_rows(posterior.mode.shape, generator).to(posterior.mode)
            return self.model.first_stage.normalize(posterior.sample(noise))

    def evaluate(self, batch: Mapping[str, Any], step: Step) -> Mapping[str, Tensor]:
        """Return the loss of each image, its noise level and the bin of the schedule, ``[b]`` each.

        Noise is fixed and noise levels are stratified, so that the losses of two validations differ by the weights alone. A
        denoiser with self-conditioning gets its own estimate, as in all but the first evaluation of a sampling.
        """
        generator, schedule = step.generator, self.model.diffusion.schedule
        batch = self._conditions(batch, generator)
        x0 = self._latents(batch, generator)
        sigma = draw_rows(lambda n: Stratified().sample(n, schedule, generator), len(x0), generator)
        noise = randn_rows(x0.shape, generator)
        with _naming_sample(batch["key"]):
            cond = self.model.conditioner(batch)
        fixed: dict[str, Any] = {"sigma": sigma, "noise": noise, "self_condition": self.model.with_estimate}
        fixed |= self.features.argument
        loss, sigma = self.loss(self.model.denoiser, self.model.diffusion, x0, cond, **fixed)
        share = schedule.t(sigma.cpu()) / schedule.num_timesteps
        bins = (share * BINS).long().clamp(max=BINS - 1)
        return {"bin": bins, "loss": loss.double().cpu(), "sigma": sigma.double().cpu()}

    def metrics(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean loss, that of each part of the schedule, and that of each range of noise levels that has a sample."""
        bins, losses = results["bin"], results["loss"]
        totals = torch.zeros(BINS, dtype=torch.float64, device="cpu").index_add_(0, bins, losses)
        counts = torch.zeros(BINS, dtype=torch.float64, device="cpu").index_add_(0, bins, torch.ones_like(losses))
        parts = {
            f"loss_{100 * i // BINS}_{100 * (i + 1) // BINS}": float(totals[i] / counts[i])
            for i in range(BINS)
            if counts[i]
        }
        by_level = np.zeros((2, len(noise_level_bins.NAMES)))
        noise_level_bins.add_to_bins(by_level, losses.numpy(), results["sigma"].numpy())
        return {"loss": float(totals.sum() / counts.sum())} | parts | noise_level_bins.means("loss", by_level)

    def export(self) -> Export:
        return Export(native.MODEL, self.model, self.model.config, self.model.tokenizer)

    def previews(self, splits: Splits, step: Step) -> Mapping[str, Preview]:
        """Return images generated from fixed noise, for fixed prompts or classes or the conditions of validation images.

        For a model of points, plots of the forward and the reverse process.
        """
        if self.of_points:
            points = next(iter(EvaluationLoader(splits("val"), POINTS)))["image"]
            return process_plots(self.model, points.to(self.device), step.generator)
        conditions = self._validation_conditions(splits, step)
        arguments = self._preview_arguments(conditions)
        if not all(arguments.values()):
            return {}
        if conditions:
            return {"samples": self._with_originals(conditions, arguments, step)}
        samples = Pipeline(self.model)(**arguments, seed=step.seed, progress=False)
        scale = max(1, LEAST_SIDE // samples[0].height)
        captions = bool(self.config.conditioner.input_keys)
        return {"samples": samples.grid(captions=captions, scale=scale)}

    def try_previews(self, splits: Splits, step: Step) -> None:
        """Make the first sampling step of the images."""
        arguments = {} if self.of_points else self._preview_arguments(self._validation_conditions(splits, step))
        if arguments and all(arguments.values()):
            stream = Pipeline(self.model).stream(**arguments, seed=step.seed, progress=False)
            next(stream)
            stream.close()
        for prompt in arguments.get("prompt", ()):
            if isinstance(prompt, str) and not self.model.conditioner.fits(prompt):
                warnings.warn(
                    f"the prompt {prompt!r} of the images made during training has more tokens than the context, to which the "
                    "captions are cut; shorten it in denoiser.prompts.",
                    stacklevel=2,
                )

    def check_annotations(self, sets: Sequence[Samples]) -> None:
        """Check all class labels; warn if the classes of the previews are not among them."""
        conditioners = [each for each in self.model.conditioner.modules() if isinstance(each, ClassConditioner)]
        if not conditioners:
            return
        found: set[int] = set()
        for samples in sets:
            labels = input_of(samples.all_annotations(), LABEL.key)
            found.update(labels.tolist())
            for conditioner in conditioners:
                conditioner.check(labels)
        absent = sorted(set(self.config.classes) - found)
        if absent:
            warnings.warn(
                f"denoiser.classes contains {', '.join(map(str, absent))}, of which there is no image; their previews "
                "will show nothing that was learned.",
                stacklevel=2,
            )

    def _validation_conditions(self, splits: Splits, step: Step) -> Mapping[str, Any]:
        """Return the first validation images with their conditions, if previews are made for these; else nothing."""
        if self.config.conditioner.input_keys in ((), ("text",), ("label",)):
            return {}
        batch = on_device(next(iter(EvaluationLoader(splits("val"), PREVIEW))), self.device)
        return self._conditions(batch, step.generator)

    def _preview_arguments(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the pipeline for the previews: the conditions, or else the fixed prompts or classes."""
        keys = self.config.conditioner.input_keys
        if conditions:
            return pipeline_arguments({key: conditions[key] for key in keys})
        if keys:
            return {"prompt": self.config.prompts} if keys == ("text",) else {"label": self.config.classes}
        return {"num_images_per_prompt": PREVIEW}

    def _with_originals(self, batch: Mapping[str, Any], arguments: Mapping[str, Any], step: Step) -> Preview:
        """Generate images for the conditions of validation images; rows: the conditions, the results, the originals."""
        generated = Pipeline(self.model)(**arguments, seed=step.seed, output_type="pt", progress=False)
        if "image" in batch:
            originals = batch["image"]
        else:
            latent = self.model.first_stage.posterior(batch).mode
            originals = self.model.decode(self.model.first_stage.normalize(latent))
        keys = self.config.conditioner.input_keys
        previews = (of_key(key).preview(batch[key], originals) for key in keys)
        rows = [*(each for each in previews if each is not None), 2 * generated - 1, originals]
        scale = max(1, LEAST_SIDE // originals.shape[-2])
        return Images.of((torch.cat(rows) + 1) / 2).grid(columns=len(originals), scale=scale)


@contextmanager
def _naming_sample(keys: Sequence[str]) -> Iterator[None]:
    """Name the sample, by its key, of which a condition is invalid, instead of its number in the batch."""
    try:
        yield
    except ConditionError as error:
        if error.row is None:
            raise
        raise TrainingError(
            f"the sample {keys[error.row]!r} {error.problem}; correct the data or denoiser.conditioner."
        ) from None


def load_encoders(handoff: Handoff, clip: Checkpoint | None, first_stage: FirstStage, conditioner: Conditioner) -> None:
    """Load the weights that first stage and conditioner have when the training of the denoiser begins."""
    if handoff.experiment.vae.model.has_weights:
        handoff.load_first_stage(first_stage)
    if clip is not None:
        for name, encoder in conditioner.pretrained_encoders():
            if name in clip.parts or not any(parameter.requires_grad for parameter in encoder.parameters()):
                handoff.load_part(clip, name, encoder)  # otherwise it is trained from random weights
    conditioner.load_pretrained()


def image_encoder_of(
    experiment: Experiment, handoff: Handoff | None = None, clip: Checkpoint | None = None
) -> nn.Module | None:
    """Build the image tower that the loss uses, if it uses one: that of its source, or of stage 2.

    Args:
        experiment: the experiment.
        handoff: access to the results of the preceding stages; None = without weights, under ``torch.device("meta")``.
        clip: the result of stage 2.
    """
    loss, section = experiment.denoiser.loss, experiment.clip
    if not loss.reads_images:
        return None
    if loss.image_encoder is not None:
        return teacher_of(loss.image_encoder, "denoiser.loss")
    assert section is not None, "the experiment has checked it"
    assert section.model.image is not None, "the experiment has checked it"
    assert section.model.embed_dim is not None, "the config of a CLIP has checked it"
    tower = section.model.image.build(section.model.embed_dim)
    if handoff is not None:
        assert clip is not None
        handoff.load_part(clip, IMAGE_ENCODER, tower)
    return tower


def _any_tokenizer(kind: TokenizerConfig) -> Tokenizer:
    """Return a tokenizer with the vocabulary size and context length of ``kind``."""
    return train_byte_bpe([""], kind.vocab_size, kind.context_length)
