"""A run folder, opened for reading: its experiment, data, metrics, and the weights of its stages."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.config import to_dict
from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.devices import default_device
from ldm.diagnosis.check import Clock
from ldm.diagnosis.pool import Pool, errors, make_pool
from ldm.errors import CheckpointError
from ldm.formats.native import CONFIG_BY_FORMAT, Header, header_of, load_strictly
from ldm.formats.tensors import read_metadata
from ldm.formats.training_checkpoint import exported
from ldm.model import LatentDiffusion, ModelConfig
from ldm.training.experiment import Experiment, load_config
from ldm.training.handoff import result_file
from ldm.training.resume import read_checkpoint
from ldm.training.tasks import TASKS
from ldm.vae import FirstStage

IMAGES = 256
"""Number of images of each split that are examined, chosen at random; all, if there are fewer."""


@dataclass(frozen=True)
class StageWeights:
    """Weights of one stage.

    Attributes:
        path: file of the averaged weights.
        header: config, tokenizer and provenance of that file.
        current: weights that training continues from, by name; None without ``last.ckpt``.
        average: weights that are exported and sampled: those of the finished stage, else the EMA.
        steps: completed optimizer steps.
        checkpoint: content of ``last.ckpt``; empty if there is none.
        finished: whether the stage has left its result.
    """

    path: Path
    header: Header
    current: Mapping[str, Tensor] | None
    average: Mapping[str, Tensor]
    steps: int
    checkpoint: Mapping[str, Any]
    finished: bool

    @property
    def handoff(self) -> Mapping[str, str]:
        """Fingerprints of the preceding stages that it was trained on."""
        return self.checkpoint.get("handoff") or self.header.provenance.get("handoff", {})


class OpenedRun:
    """A run, of which nothing is changed.

    Args:
        folder: run folder, with the ``config.yaml`` that training writes.
        overrides: ``key=value`` changes of the config, such as another guidance scale.

    Raises:
        ConfigError: there is no config, or an invalid one.
        CheckpointError: no stage has weights, or they cannot be read.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = ()):
        self.folder, self.changed = folder, bool(overrides)
        self.experiment: Experiment = load_config(folder / "config.yaml", [*overrides, f"run_dir={folder}"])
        self.stages = {
            stage: weights
            for stage in TASKS
            if getattr(self.experiment, stage) is not None
            and (weights := read_stage(self.experiment, stage)) is not None
        }
        if not self.stages:
            raise CheckpointError(
                f"{folder} holds neither a last.ckpt nor a result of a stage; train a stage until its first checkpoint."
            )
        self.device = default_device()
        self.pool = lru_cache(self._pool)
        self.images = lru_cache(self._images)
        self.samples = lru_cache(self._samples)
        self._errors: dict[tuple[str, bool], Tensor] = {}

    # Data

    def _samples(self, split: str) -> Samples:
        return self.experiment.data.without_cache().open(split)

    @property
    def validates(self) -> bool:
        """True if there are validation data."""
        return self.experiment.data.has("val")

    def _images(self, split: str) -> Batch:
        """Return the examined samples of a split: ``image [n c h w]`` in [-1, 1], and annotations."""
        samples = self.samples(split)
        index = np.random.default_rng(0).permutation(len(samples))[:IMAGES]
        return samples[BatchIndices(index)]

    # Weights

    @cached_property
    def newest(self) -> str:
        """The last stage that has weights."""
        return list(self.stages)[-1]

    @cached_property
    def config(self) -> ModelConfig:
        """Config of the model of stage 3 as it is sampled.

        The file of a finished stage has its own schedule, parametrization and sampling, which pipelines use. Otherwise they are
        those of ``config.yaml``.
        """
        weights = self.stages["denoiser"]
        recorded: ModelConfig = weights.header.config
        if weights.finished and not self.changed:
            return recorded
        stage = self.experiment.denoiser
        return replace(recorded, diffusion=stage.diffusion, sampling=stage.sampling)

    def model(self, averaged: bool = True) -> LatentDiffusion:
        """Build the model of stage 3 with its averaged or its current weights, in evaluation mode."""
        weights = self.stages["denoiser"]
        tensors = weights.average if averaged or weights.current is None else weights.current
        model = LatentDiffusion(self.config, weights.header.tokenizer)
        load_strictly(model, {name: tensor.clone() for name, tensor in tensors.items()}, weights.path, torch.float32)
        return model.eval().requires_grad_(False).to(self.device)

    @cached_property
    def averaged(self) -> LatentDiffusion:
        """The model that is sampled; not to be changed."""
        return self.model()

    @cached_property
    def first_stage(self) -> FirstStage | None:
        """First stage of the model of stage 3, else that of stage 1, in evaluation mode."""
        if "denoiser" in self.stages:
            return self.averaged.first_stage
        if "vae" not in self.stages:
            return None
        weights = self.stages["vae"]
        stage: FirstStage = weights.header.config.build()
        load_strictly(stage, weights.average, weights.path, torch.float32)
        return stage.eval().requires_grad_(False).to(self.device)

    def _pool(self, split: str) -> Pool:
        """Return latents and conditions of the examined samples of a split."""
        return make_pool(self.averaged, self.images(split), self.device)

    def errors(self, clock: Clock, split: str = "train", averaged: bool = True) -> Tensor:
        """Return :func:`ldm.diagnosis.pool.errors` of the averaged or current weights on a split, measured once."""
        key = (split, averaged)
        if key not in self._errors:
            model = self.averaged if averaged else self.model(averaged=False)
            self._errors[key] = errors(model, self.pool(split), clock)
        return self._errors[key]

    # Metrics

    def metrics(self, stage: str) -> list[dict[str, float]]:
        """Return the rows of ``metrics.csv``, each with its numbers by name."""
        path = self.folder / stage / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            rows = [
                {name: _number(text) for name, text in row.items() if name and text} for row in csv.DictReader(file)
            ]
        return [row for row in rows if "step" in row]

    def recorded_settings(self, stage: str) -> Mapping[str, Any]:
        """Return the section of a stage that its ``last.ckpt`` was trained with, as plain values; empty if unknown."""
        settings = self.stages[stage].checkpoint.get("settings", {})
        section: Mapping[str, Any] = settings.get(stage, {})
        return section

    def section(self, stage: str) -> Mapping[str, Any]:
        """Return the section of a stage in the config, as plain values."""
        section: Mapping[str, Any] = to_dict(getattr(self.experiment, stage))
        return section


def read_stage(experiment: Experiment, stage: str) -> StageWeights | None:
    """Read the weights of a stage from its result and its ``last.ckpt``; None if it has neither.

    Raises:
        CheckpointError: one cannot be read.
    """
    last, result = experiment.folder / stage / "last.ckpt", result_file(experiment, stage)
    if not last.is_file() and not result.is_file():
        return None
    content: Mapping[str, Any] = read_checkpoint(last, "restore it") if last.is_file() else {}
    current, average, header, path = None, None, None, last
    if content:
        current, metadata = exported(content, last, ema=False)
        average, _ = exported(content, last, ema=True)
        header = header_of(metadata, last, CONFIG_BY_FORMAT[metadata["format"]])
    if result.is_file():
        metadata = read_metadata(result)
        header, average, path = (
            header_of(metadata, result, CONFIG_BY_FORMAT[metadata["format"]]),
            load_file(result),
            result,
        )
        if current is not None:  # statistics of latents are measured when the stage ends
            current = {name: current.get(name, tensor) for name, tensor in average.items()}
    assert header is not None
    assert average is not None
    steps = int(content.get("completed_steps", header.provenance.get("steps", 0)))
    return StageWeights(path, header, current, average, steps, content, result.is_file())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
