"""Runs that are trained in the run folder of another experiment, to learn something about it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.config import to_dict
from ldm.data.config import DataConfig
from ldm.errors import LdmError, TrainingError
from ldm.formats.tensors import read_metadata
from ldm.training.config import TrainConfig
from ldm.training.experiment import Experiment
from ldm.training.handoff import result_file
from ldm.training.stages import train_stage

VALIDATIONS = 4
"""Validations of a run; in a forecast the lowest loss counts, as it is that of ``best.ckpt``."""

WARM_UP = 10
"""Warm-up of a run takes at most one in this number of its steps."""

REPORTING = ("log_every", "validate_every", "images_every", "checkpoint_every", "keep_checkpoints")
"""Fields of ``train`` that do not change what is trained."""

SCHEDULE = ("max_steps", "warmup_steps")
"""Fields of ``train`` that say how long a training is."""

MACHINE = ("cache", "workers", "cache_latents", "encoded")
"""Fields of ``data`` that do not change what is trained on."""


def with_predecessors(
    experiment: Experiment, stage: str, purpose: str, train: bool = False, hint: str = ""
) -> Experiment:
    """Return the experiment with the results of the stages before ``stage`` in its run folder as sources.

    Args:
        experiment: the experiment.
        stage: ``denoiser``; the others have no predecessors.
        purpose: what the results are needed for, for the error message.
        train: True to train a stage whose result is missing.
        hint: what else can be done if one is missing.

    Raises:
        TrainingError: a result is missing.
    """
    for before in (each for each in experiment.stages if each in ("vae", "clip") and stage == "denoiser"):
        path = result_file(experiment, before)
        if not path.is_file() and not train:
            raise TrainingError(
                f"{purpose} of stage {stage} needs the result of stage {before}, but {path} does not exist; train it first "
                f"(tools/train.py --stage {before}){hint}."
            )
        path = train_stage(experiment, before) if train else path
        section = replace(getattr(experiment, before), train=None, checkpoint=str(path.absolute()))
        experiment = replace(experiment, **{before: section})
    return replace(experiment, decoder=None)


def with_steps(train: TrainConfig, steps: int) -> TrainConfig:
    """Return the config of a training with its schedule over ``steps`` steps, and few validations and checkpoints."""
    every = max(1, steps // VALIDATIONS)
    return replace(
        train,
        max_steps=steps,
        warmup_steps=min(train.warmup_steps, steps // WARM_UP),
        log_every=max(1, min(train.log_every, steps // 10)),
        validate_every=every,
        images_every=steps,
        checkpoint_every=every,
        keep_checkpoints=1,
    )


def link_latents(folder: Path, own: Path) -> None:
    """Give a run folder the cached latents and features of another; its training encodes those again that are of other images."""
    for name in ("train", "val", "train-teacher"):
        source, link = (each / "latents" / f"{name}.safetensors" for each in (folder, own))
        if source.is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # file systems without hard links
                os.link(source, link)


def digest(experiment: Experiment, stage: str, without: Sequence[str] = ()) -> str:
    """Return a hash of what the training of a stage, and the default sampling of its model, depend on, also of the images.

    Args:
        experiment: the experiment.
        stage: the stage.
        without: fields of ``train`` that are left out.
    """
    section, data = to_dict(getattr(experiment, stage)), to_dict(experiment.data)
    section["train"] = {name: each for name, each in section["train"].items() if name not in (*REPORTING, *without)}
    shared = {
        "section": {name: each for name, each in section.items() if name not in ("prompts", "classes")},
        "data": {name: each for name, each in data.items() if name not in (*MACHINE, "test")},
        "images": _images(experiment.data),
        "seed": experiment.seed,
        "precision": [experiment.trainer.precision, experiment.trainer.compile],
    }
    if stage == "denoiser":
        before = (experiment.vae, experiment.clip)
        shared["stages"] = [None if each is None else [to_dict(each.model), each.checkpoint] for each in before]
    shared = _by_weights(shared)
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]


def _images(data: DataConfig) -> list[str]:
    """Return the fingerprints of the images that are trained on and validated with, which a path does not determine."""
    key = json.dumps(to_dict(data), sort_keys=True)
    if key not in _FINGERPRINTS:
        opened = data.without_cache()
        _FINGERPRINTS[key] = [opened.open(split).fingerprint for split in ("train", "val") if opened.has(split)]
    return _FINGERPRINTS[key]


_FINGERPRINTS: dict[str, list[str]] = {}
"""Fingerprints that :func:`_images` found in this process, by the config of the data."""


def _by_weights(value: Any) -> Any:
    """Replace the names of files of weights, anywhere in a value, by their fingerprints."""
    if isinstance(value, Mapping):
        return {name: _by_weights(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_by_weights(each) for each in value]
    return weights_of(value) if isinstance(value, str) else value


def weights_of(source: str) -> str:
    """Return the fingerprint that a file of weights records, or its name if it is another format, or no file."""
    with suppress(LdmError, OSError):
        if Path(source).is_file():
            return read_metadata(Path(source)).get("fingerprint") or source
    return source
