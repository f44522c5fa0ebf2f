"""Hand-off between the stages: what a stage uses from the preceding ones, and the check that it fits the config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.config import to_dict
from ldm.data.stream import EvaluationLoader
from ldm.devices import default_device
from ldm.errors import CheckpointError, TrainingError, warn
from ldm.formats import read
from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, TINY_DECODER, Checkpoint, joined
from ldm.formats.native import CLIP, FIRST_STAGE, load_strictly, save_model
from ldm.formats.tensors import fingerprint, read_metadata
from ldm.formats.training_checkpoint import resume_points
from ldm.training.experiment import Experiment
from ldm.training.tasks import TASKS, DecoderTask, DenoiserTask, Task, VAETask
from ldm.training.tasks.task import FIRST_STAGE as FIRST_STAGE_PART
from ldm.training.tasks.task import PART_SECTIONS
from ldm.vae import FirstStage
from ldm.vae.metrics import measure_latents

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

    ``fingerprints`` has the fingerprint of each preceding stage whose result was read; ``files`` has the text of each new file of
    the stage, which is written when its training begins.
    """

    def __init__(self, experiment: Experiment, stage: str):
        self.experiment = experiment
        self.stage = stage
        self.fingerprints: dict[str, str] = {}
        self.files: dict[Path, str] = {}

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

    def load_first_stage(self, first_stage: FirstStage) -> None:
        """Load the result of stage 1, or its source; the latents of one whose training was not finished are measured here.

        Raises:
            TrainingError, CheckpointError: as :meth:`predecessor` and :meth:`load_part`.
        """
        source, experiment = self.predecessor(VAETask.stage), self.experiment
        self.load_part(source, FIRST_STAGE_PART, first_stage)
        resumed = bool(resume_points(experiment.folder / self.stage))  # which holds what was measured
        if source.kind == FIRST_STAGE and source.part(FIRST_STAGE_PART).inferred and not resumed:
            train = experiment.vae.train or getattr(experiment, self.stage).train
            device = torch.device("cpu") if experiment.trainer.accelerator == "cpu" else default_device()
            batches = EvaluationLoader(experiment.data.open("train"), train.batch_size, bucketed=True)
            measure_latents(first_stage.to(device).eval(), batches, device)
            first_stage.to("cpu").train()

    def tokenizer(self, config: TokenizerConfig, name: str = "") -> Tokenizer:
        """Return a tokenizer of the stage, made from the training captions once and then read from ``tokenizer<name>.json``.

        It is made again if the config or the captions have changed, unless a checkpoint of the stage was trained with it.
        ``tokenizer<name>.source.json`` records what it was made from.
        """
        folder = self.experiment.folder / self.stage
        path, record = folder / f"tokenizer{name}.json", folder / f"tokenizer{name}.source.json"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and self._is_trained():
            return Tokenizer.from_json(text)
        samples = self.experiment.data.open("train")
        made_from = {"config": to_dict(config), "captions": samples.captions_fingerprint, "path": _digest(config)}
        if text and record.is_file() and record.read_text(encoding="utf-8") == _record(made_from, text):
            return Tokenizer.from_json(text)
        tokenizer = config.build(samples.all_captions(f"the tokenizer of stage {self.stage}"))
        text = tokenizer.to_json()
        self.files |= {path: text, record: _record(made_from, text)}
        return tokenizer

    def tokenizer_of(self, source: Checkpoint) -> Tokenizer:
        """Return the tokenizer of a source, which becomes that of the stage in ``tokenizer.json``.

        Raises:
            CheckpointError: the source has none.
        """
        if source.tokenizer is None:
            raise CheckpointError(f"{source.source} holds no tokenizer for its text encoder; name another source.")
        self.files[self.experiment.folder / self.stage / "tokenizer.json"] = source.tokenizer.to_json()
        return source.tokenizer

    def _is_trained(self) -> bool:
        """Return True if the stage has a checkpoint, or is finished."""
        if resume_points(self.experiment.folder / self.stage):
            return True
        result, train = result_file(self.experiment, self.stage), getattr(self.experiment, self.stage).train
        return bool(result.is_file() and _provenance(result).get("steps", 0) >= train.max_steps)


def result_file(experiment: Experiment, stage: str) -> Path:
    """Return the path of the result of a finished stage in the run folder."""
    return experiment.folder / TASKS[stage].result


def add_tiny_decoder(experiment: Experiment) -> None:
    """Write the result of stage 4 into the model's file, if the run has both and the file does not hold it yet."""
    path, source = result_file(experiment, DenoiserTask.stage), result_file(experiment, DecoderTask.stage)
    if not (path.is_file() and source.is_file()):
        return
    model, decoder = read(path), read(source)
    made_from = [found.provenance.get("handoff", {}).get(VAETask.stage) for found in (model, decoder)]
    if made_from[0] != made_from[1]:
        warn(
            f"{path} was trained on another first stage than {source}, which is therefore not added to it; train stage "
            f"{DenoiserTask.stage} again."
        )
        return
    before, now = (found.parts.get(TINY_DECODER) for found in (model, decoder))
    if before is None or now is None or fingerprint(before.state, {}) != fingerprint(now.state, {}):
        complete = model.with_part(TINY_DECODER, decoder).build(None)
        save_model(path, complete, model.provenance)


def is_finished(result: Path, stage: str, steps: int, handoff: Mapping[str, str]) -> bool:
    """Return True if the file of a stage was trained for at least ``steps`` on predecessors with these fingerprints.

    Raises:
        CheckpointError: it was trained on other predecessors.
    """
    if not result.is_file():
        return False
    provenance = _provenance(result)
    if provenance.get("handoff") != handoff:
        raise CheckpointError(
            f"{result} was made from predecessors with the fingerprints {provenance.get('handoff')}, but the current ones have "
            f"{handoff}; move it and the folder of stage {stage} to train the stage again."
        )
    return bool(provenance.get("steps", 0) >= steps)


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
    """Check that a part of a source was built from ``config``, apart from fields that do not shape the weights.

    Raises:
        CheckpointError: it was not (the message names each field that differs), or the source has no such part.
    """
    section = PART_SECTIONS.get(name, f"clip.model.{name}")
    there, here = _flat(to_dict(source.part(name).config)), _flat(to_dict(config))
    differing = [
        f"{section}.{field} is {here.get(field)!r} here and {there.get(field)!r} there"
        for field in sorted(there.keys() | here.keys())
        if there.get(field) != here.get(field) and field not in ("dropout", "overflows_fp16")
    ]
    if differing:
        raise CheckpointError(f"{source.source} does not fit the config: {'; '.join(differing)}.")


def _fingerprint(source: Checkpoint, task: type[Task]) -> str:
    """Return the fingerprint of the result of a stage, or of the parts of another source that the stage would have produced."""
    if source.kind in (CLIP, FIRST_STAGE):  # only a checkpoint of a training has no fingerprint
        complete = joined(source.parts, CLIP_COMPONENTS) if source.kind == CLIP else source.part(FIRST_STAGE_PART).state
        return source.fingerprint or fingerprint(complete, source.fingerprinted)
    parts = {FINGERPRINT_NAMES.get(name, name): source.part(name) for name in task.parts_of(source)}
    states = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state.items()}
    return fingerprint(states, {name: to_dict(part.config) for name, part in parts.items()})


def _record(made_from: Mapping[str, Any], text: str) -> str:
    """Return the record of what a file was made from, and of its content."""
    return json.dumps({**made_from, "content": hashlib.sha256(text.encode()).hexdigest()})


def _provenance(result: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_metadata(result).get("provenance", "{}"))
    return found


def _digest(config: TokenizerConfig) -> str | None:
    """Return a hash of the file that a tokenizer is read from, if its config names one that exists."""
    path = getattr(config, "path", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the plain values of nested mappings by their dotted names."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        name: value
        for key, child in node.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()
    }
