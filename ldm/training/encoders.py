"""The frozen encoders of an experiment: first stage and text encoders as the training of the denoiser uses them."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.conditioning import Conditioner
from ldm.data.config import ShardsData
from ldm.data.encoded_source import EncodedSource
from ldm.data.teacher import Teacher
from ldm.errors import ConfigError
from ldm.training.experiment import Experiment
from ldm.training.handoff import Handoff
from ldm.training.tasks import DenoiserTask, VAETask
from ldm.training.tasks.denoiser import image_encoder_of, load_encoders
from ldm.vae import FirstStage


def frozen_encoders(experiment: Experiment) -> EncodedSource:
    """Build first stage and conditioner of stage 3 with the weights that it begins with, and return the data they encode.

    Raises:
        TrainingError: a predecessor has not been trained.
        CheckpointError: a predecessor does not fit the config.
        ConfigError: there is nothing to encode.
    """
    handoff, config = Handoff(experiment, DenoiserTask.stage), experiment.model_config
    clip = None if experiment.clip is None else handoff.predecessor("clip")
    first_stage = config.first_stage.build()
    conditioner = config.conditioner.with_tokenizer(handoff.tokenizer).build(None if clip is None else clip.tokenizer)
    load_encoders(handoff, clip, first_stage, conditioner)
    network = image_encoder_of(experiment, handoff, clip)
    teacher = None
    if network is not None:
        teacher = Teacher(network.requires_grad_(False).eval(), experiment.denoiser.loss.layer_of(network))
    return encoded_source(experiment, first_stage.eval(), conditioner.eval(), handoff.fingerprints, teacher)


def encoded_source(
    experiment: Experiment,
    first_stage: FirstStage,
    conditioner: Conditioner,
    fingerprints: Mapping[str, str],
    teacher: Teacher | None,
) -> EncodedSource:
    """Return the encoded data of an experiment.

    Args:
        experiment: its ``data.encoded.folder`` is set.
        first_stage, conditioner: those of stage 3, with their weights.
        fingerprints: fingerprints of the results of preceding stages.
        teacher: network whose features the loss reads; None if it reads none.

    Raises:
        ConfigError: there is nothing to encode.
    """
    data = experiment.data
    if not isinstance(data, ShardsData):
        raise ConfigError("the data are not shards, which alone can be encoded; set data.kind to shards.")
    if data.encoded.folder is None:
        raise ConfigError("data.encoded.folder is null; name the folder or URL for latents and text states.")
    if not experiment.vae.model.has_weights:
        raise ConfigError("the first stage has no weights, so there are no latents; set data.encoded.folder to null.")
    return EncodedSource(data, first_stage, fingerprints[VAETask.stage], conditioner, teacher)
