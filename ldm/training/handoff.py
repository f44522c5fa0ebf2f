"""Hand-off between the stages: what a stage uses from the preceding ones, and the check that it fits the config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.config import to_dict
from ldm.data.samples import captions_of
from ldm.errors import CheckpointError, TrainingError
from ldm.formats import read
from ldm.formats.checkpoint import OTHERS, Checkpoint
from ldm.formats.native import CLIP, FIRST_STAGE, load_strictly
from ldm.formats.tensors import fingerprint, read_metadata, write_atomically
from ldm.training.experiment import Experiment
from ldm.training.tasks import TASKS, Task
from ldm.training.tasks.task import PART_SECTIONS

FINGERPRINT_NAMES = {
    "first_stage": "vae",
    "denoiser": "unet",
    "text_encoder": "text",
    "text_encoder_2": "text_2",
    "image_encoder": "image",
}
"""Names of the parts in fingerprints, which existing runs have recorded under the former names of parts."""


class Handoff:
    """Access to the results of preceding stages that a stage of an experiment uses.

    ``fingerprints`` has the fingerprint of each preceding stage whose result was read.
    """

    def __init__(self, experiment: Experiment, stage: str):
        self.experiment = experiment
        self.stage = stage
        self.fingerprints: dict[str, str] = {}

    def predecessor(self, stage: str) -> Checkpoint:
        """Read the result of a preceding stage, or the source that the config names instead (``<stage>.checkpoint``).

        Raises:
            TrainingError: the stage has not been trained.
        """
        path, source = result_file(self.experiment, stage), getattr(self.experiment, stage).checkpoint
        if source is None and not path.is_file():
            raise TrainingError(
                f"stage {self.stage} needs the result of stage {stage}, but {path} does not exist; "
                f"train it first (--stage {stage}, or --stage all) or name a source as {stage}.checkpoint."
            )
        found = read(source or path)
        self.fingerprints[stage] = _fingerprint(found, TASKS[stage])
        return found

    def load_part(self, source: Checkpoint, name: str, network: nn.Module) -> None:
        """Load a part of a source into a network of the same config.

        Raises:
            CheckpointError: the source has no such part, or one of another config.
        """
        check_fit(source, name, network.config)
        load_strictly(network, source.part(name).state, source.source, torch.float32)

    def tokenizer(self, config: TokenizerConfig, name: str = "") -> Tokenizer:
        """Return a tokenizer of the stage: made from the training captions once, then read from ``tokenizer<name>.json``."""
        path = self.experiment.folder / self.stage / f"tokenizer{name}.json"
        if path.is_file():
            return Tokenizer.from_json(path.read_text(encoding="utf-8"))
        samples = self.experiment.data.open("train")
        annotations = samples.annotations(np.arange(len(samples)))
        tokenizer = config.build(captions_of(annotations, f"the tokenizer of stage {self.stage}"))
        write_atomically(path, lambda temporary: temporary.write_text(tokenizer.to_json(), encoding="utf-8"))
        return tokenizer


def result_file(experiment: Experiment, stage: str) -> Path:
    """Return the path of the result of a finished stage in the run folder."""
    return experiment.folder / TASKS[stage].result


def is_finished(result: Path, stage: str, steps: int, handoff: Mapping[str, str]) -> bool:
    """Return True if the file of a stage was trained for at least ``steps`` on predecessors with these fingerprints.

    Raises:
        CheckpointError: it was trained on other predecessors.
    """
    if not result.is_file():
        return False
    provenance = json.loads(read_metadata(result).get("provenance", "{}"))
    if provenance.get("handoff") != handoff:
        raise CheckpointError(
            f"{result} was made from predecessors with the fingerprints {provenance.get('handoff')}, but the current ones have "
            f"{handoff}; move it and the folder of stage {stage} to train the stage again."
        )
    return provenance.get("steps", 0) >= steps


def initialize(task: Task, source: str) -> None:
    """Load the trainable weights of a task from ``train.init``; frozen ones stay those of the predecessors.

    Raises:
        CheckpointError: the source lacks a part, or has one of another config.
    """
    network, found = task.trainable_module, read(source)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in network.state_dict().items() if name not in trained}
    for name, home in task.parts.items():
        prefix = f"{home}." if home else ""
        if any(each.startswith(prefix) for each in trained):
            check_fit(found, name, network.get_submodule(home).config)
            own = ((f"{prefix}{key}", tensor) for key, tensor in found.part(name).state.items())
            state |= {key: tensor for key, tensor in own if key in trained}
    others = found.parts[OTHERS].state if OTHERS in found.parts else {}
    state |= {name: tensor for name, tensor in others.items() if name in trained}
    load_strictly(network, state, source, torch.float32)


def check_fit(source: Checkpoint, name: str, config: Any) -> None:
    """Check that a part of a source was built from ``config``, apart from dropout.

    Raises:
        CheckpointError: it was not (the message names each field that differs), or the source has no such part.
    """
    section = PART_SECTIONS.get(name, f"clip.model.{name}")
    there, here = _flat(to_dict(source.part(name).config)), _flat(to_dict(config))
    differing = [
        f"{section}.{field} is {here.get(field)!r} here and {there.get(field)!r} there"
        for field in sorted(there.keys() | here.keys())
        if there.get(field) != here.get(field) and field != "dropout"  # not a property of the weights
    ]
    if differing:
        raise CheckpointError(f"{source.source} does not fit the config: {'; '.join(differing)}.")


def _fingerprint(source: Checkpoint, task: type[Task]) -> str:
    """Return the fingerprint of the result of a stage, or of the parts of another source that the stage would have produced."""
    if source.kind in (CLIP, FIRST_STAGE):
        return source.fingerprint
    parts = {FINGERPRINT_NAMES.get(name, name): source.part(name) for name in task.parts_of(source)}
    states = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state.items()}
    return fingerprint(states, {name: to_dict(part.config) for name, part in parts.items()})


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the plain values of nested mappings by their dotted names."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        name: value
        for key, child in node.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()
    }
