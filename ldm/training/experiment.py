"""Experiment: data, trainer and the stages, read from one YAML, and the check that they fit each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config import config_field, from_dict, read_yaml
from ldm.data.config import DataConfig
from ldm.diffusion import SPECS, Schedule, sigmas
from ldm.errors import ConfigError, SamplingError
from ldm.model import ModelConfig, SamplingConfig
from ldm.paths import expanded
from ldm.sampling_settings import SamplingSettings
from ldm.training.config import TrainerConfig
from ldm.training.tasks import TASKS
from ldm.training.tasks.clip import CLIPStage
from ldm.training.tasks.decoder import DecoderStage
from ldm.training.tasks.denoiser import DenoiserStage
from ldm.training.tasks.vae import VAEStage


@dataclass(frozen=True)
class Experiment:
    """An experiment: one YAML, one run folder, one pipeline."""

    name: str = config_field(help="name of the experiment; the run folder is runs/<name>")
    data: DataConfig = config_field(help="images and captions")
    vae: VAEStage = config_field(help="stage 1, the first stage")
    denoiser: DenoiserStage = config_field(help="stage 3, the denoiser")
    clip: CLIPStage | None = config_field(None, "stage 2, tokenizer and CLIP; null if no conditioner reads text")
    decoder: DecoderStage | None = config_field(None, "stage 4, a tiny decoder; null = none")
    run_dir: str | None = config_field(None, "run folder; null = runs/<name>", path=True)
    seed: int = config_field(0, "seed for every random generator of the run")
    trainer: TrainerConfig = config_field(TrainerConfig(), "devices and precision")

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise ConfigError(f"name is {self.name!r}; give one without slashes, and the place as run_dir.")
        if self.clip is not None:
            tokenizer, text = self.clip.tokenizer, self.clip.model.text
            if tokenizer.vocab_size > text.vocab_size or tokenizer.context_length > text.context_length:
                raise ConfigError(
                    f"clip.tokenizer makes up to {tokenizer.context_length} tokens below {tokenizer.vocab_size}, but "
                    f"clip.model.text has context_length {text.context_length} and vocab_size {text.vocab_size}."
                )
            if self.clip.train is not None and self.data.image_shape[0] != 3:
                raise ConfigError(
                    f"clip needs images with 3 channels, but those of the data have {self.data.image_shape[0]}."
                )
        if "image" in self.denoiser.conditioner.input_keys:
            if self.data.has_latents:
                raise ConfigError(
                    "denoiser.conditioner reads images, which cached latents lack; set data.cache_latents to false and "
                    "data.encoded.folder to null."
                )
            if self.data.image_shape[0] != 3:
                raise ConfigError(
                    f"denoiser.conditioner needs images with 3 channels, but those of the data have {self.data.image_shape[0]}."
                )
        try:  # not by the section, which is also read from checkpoints of versions that allowed more
            self.denoiser.loss.check(self.denoiser.diffusion)
        except ConfigError as error:
            raise ConfigError(f"denoiser: loss: {error}") from None
        if self.denoiser.loss.reads_images:
            self._check_loss_of_images()
        if self.vae.train is not None:
            if self.vae.train.ema_snapshots is not None:
                raise ConfigError(
                    "vae.train.ema_snapshots cannot be used, since the latent statistics of a first stage belong to its own "
                    "average; remove it, and set vae.train.ema_decay."
                )
            try:
                for shape in (self.data.image_shape[1:], *self.data.bucket_shapes):
                    self.vae.loss.check_size(*shape, self.vae.model.factor)
            except ConfigError as error:
                raise ConfigError(f"vae.loss: {error}") from None
        if self.decoder is not None:
            if not self.vae.model.has_weights:
                raise ConfigError(
                    f"the first stage {self.vae.model.kind} has no decoder to distil; set decoder to null."
                )
            try:
                self.decoder.model.check_fit(self.vae.model)
            except ConfigError as error:
                raise ConfigError(f"decoder.model: {error}") from None
        _ = self.model_config  # raises if the stages do not fit
        multiple = self.vae.model.factor * self.denoiser.model.factor
        if any(side % multiple for shape in self.data.bucket_shapes for side in shape):
            raise ConfigError(
                f"the sides of data.buckets must be multiples of {multiple}, the downsampling of first stage "
                f"({self.vae.model.factor}) and denoiser ({self.denoiser.model.factor}); set data.buckets.step to one."
            )
        try:
            _check_sampling(self.denoiser.sampling, self.denoiser.diffusion.schedule)
        except SamplingError as error:
            raise ConfigError(f"denoiser.sampling: {error}") from None

    def _check_loss_of_images(self) -> None:
        """Check that images have colours for a loss of the denoiser that reads them, and that it has a teacher.

        Raises:
            ConfigError: they have not.
        """
        loss, channels = self.denoiser.loss, self.data.image_shape[0]
        if channels != 3:
            raise ConfigError(
                f"denoiser.loss: {loss.kind} needs images with 3 channels, but those of the data have {channels}."
            )
        if loss.image_encoder is None and (self.clip is None or self.clip.model.image is None):
            raise ConfigError(
                f"denoiser.loss: {loss.kind} needs a teacher, but the experiment has no image tower; name the source of one as "
                "checkpoint."
            )

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages that this experiment trains, in order."""
        sections = {stage: getattr(self, stage) for stage in TASKS}
        return tuple(stage for stage, section in sections.items() if section is not None and section.train is not None)

    def data_of(self, stage: str) -> DataConfig:
        """Return the data of a stage: without aspect buckets, if its networks take images of one size only."""
        return self.data.of_one_size() if TASKS[stage].one_size else self.data

    @property
    def model_config(self) -> ModelConfig:
        """Config of the model that consists of the results of the stages.

        Raises:
            ConfigError: they do not fit each other.
        """
        channels, height, width = self.data.image_shape
        if channels != self.vae.model.image_channels:
            raise ConfigError(
                f"vae.model.image_channels is {self.vae.model.image_channels}, but the data's images have {channels}."
            )
        factor = self.vae.model.factor
        return ModelConfig(
            first_stage=self.vae.model,
            conditioner=self.denoiser.conditioner.resolved(
                None if self.clip is None else self.clip.model, (height // factor, width // factor), factor
            ),
            denoiser=self.denoiser.model,
            diffusion=self.denoiser.diffusion,
            size=(height, width),
            sampling=self.denoiser.sampling,
        )


def _check_sampling(config: SamplingConfig, schedule: Schedule) -> None:
    """Check the default sampling of a model, which the previews of the training use.

    Raises:
        SamplingError: a setting is invalid, or the schedule does not have these noise levels.
    """
    steps = config.num_inference_steps
    SamplingSettings.of(num_inference_steps=steps, guidance_scale=config.guidance_scale, shift=config.shift)
    final, grid = config.final_of(config.sampler), SPECS[config.sampler].grid
    sigmas(schedule, steps, config.spacing, config.offset, final, config.shift, grid)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check the experiment of a YAML file and ``key=value`` overrides.

    Raises:
        ConfigError: it is invalid; the message names the file and the place.
    """
    path = expanded(path)
    try:
        for override in overrides:
            if override.rstrip().endswith("=") and override.count("=") == 1:
                raise ConfigError(f"the override {override!r} has no value; write {override.strip()}null for none.")
        experiment = from_dict(Experiment, read_yaml(path, overrides))
        existing = next(folder for folder in (experiment.folder, *experiment.folder.parents) if folder.exists())
        if not existing.is_dir():
            raise ConfigError(f"run_dir is {experiment.folder}, but {existing} is a file; name a folder.")
        return experiment
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
