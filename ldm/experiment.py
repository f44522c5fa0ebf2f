"""One experiment: data, trainer and the three stages, read from one YAML, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.clip.module import CLIPStage
from ldm.config import config_field, from_dict, read_yaml
from ldm.data.config import DataConfig
from ldm.denoiser.module import DenoiserStage
from ldm.errors import ConfigError
from ldm.model import ModelConfig
from ldm.training.fit import TrainerConfig
from ldm.vae.module import VAEStage

STAGES = ("vae", "clip", "denoiser")


@dataclass(frozen=True)
class Experiment:
    """One YAML, one run folder, one pipeline."""

    name: str = config_field(help="of the experiment; the run folder is runs/<name>")
    data: DataConfig = config_field(help="pictures and captions")
    vae: VAEStage = config_field(help="stage 1, the first stage")
    denoiser: DenoiserStage = config_field(help="stage 3, the denoiser")
    clip: CLIPStage | None = config_field(None, "stage 2, tokenizer and CLIP; null where nothing reads text")
    run_dir: str | None = config_field(None, "where everything goes; null = runs/<name>")
    seed: int = config_field(0, "of all randomness")
    trainer: TrainerConfig = config_field(TrainerConfig(), "devices and precision")

    def __post_init__(self) -> None:
        if self.clip is not None:
            tokenizer, text = self.clip.tokenizer, self.clip.model.text
            if tokenizer.vocab_size > text.vocab_size or tokenizer.context_length > text.context_length:
                raise ConfigError(
                    f"clip.tokenizer makes up to {tokenizer.context_length} tokens below {tokenizer.vocab_size}, but "
                    f"clip.model.text has context_length {text.context_length} and vocab_size {text.vocab_size}."
                )
            if self.clip.train is not None and self.data.image_shape[0] != 3:
                raise ConfigError(f"clip reads images of 3 channels, but the data's have {self.data.image_shape[0]}.")
        if "image" in self.denoiser.conditioner.input_keys:
            if self.data.cache_latents:
                raise ConfigError(
                    "denoiser.conditioner reads images, which cached latents lack; set data.cache_latents to false."
                )
            if self.data.image_shape[0] != 3:
                raise ConfigError(
                    f"denoiser.conditioner reads images of 3 channels, but the data's have {self.data.image_shape[0]}."
                )
        model_config(self)

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are trained here, in order."""
        trained = {
            "vae": self.vae.train,
            "clip": self.clip and self.clip.train,
            "denoiser": self.denoiser.train,
        }
        return tuple(stage for stage in STAGES if trained[stage])


def model_config(experiment: Experiment) -> ModelConfig:
    """The model that the experiment's stages make together.

    Raises:
        ConfigError: they do not fit each other.
    """
    channels, height, width = experiment.data.image_shape
    if channels != experiment.vae.model.image_channels:
        raise ConfigError(
            f"vae.model.image_channels is {experiment.vae.model.image_channels}, but the data's images have {channels}."
        )
    clip, factor = experiment.clip, experiment.vae.model.factor
    return ModelConfig(
        first_stage=experiment.vae.model,
        conditioner=experiment.denoiser.conditioner.resolved(
            None if clip is None else clip.model, (height // factor, width // factor), factor
        ),
        denoiser=experiment.denoiser.model,
        diffusion=experiment.denoiser.diffusion,
        size=(height, width),
        sampling=experiment.denoiser.sampling,
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a YAML file and ``key=value`` overrides, checked.

    Raises:
        ConfigError: one sentence that names the file and the place.
    """
    try:
        return from_dict(Experiment, read_yaml(path, overrides))
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
