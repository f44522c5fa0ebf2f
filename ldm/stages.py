"""From one stage to the next: what each begins with, what it leaves, and the check that the two fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm import __version__
from ldm.clip.module import CLIPModule
from ldm.clip.tokenizer import Tokenizer, TokenizerConfig
from ldm.config import to_dict, to_yaml
from ldm.data.datamodule import DataModule, LatentSource
from ldm.data.stream import EvaluationLoader
from ldm.denoiser.module import DenoiserModule
from ldm.errors import CheckpointError, TrainingError
from ldm.experiment import Experiment, model_config
from ldm.formats import MODEL_FILE, read
from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, Checkpoint, part_prefixes
from ldm.formats.native import CLIP, FIRST_STAGE, load_strictly, save_model, save_module
from ldm.formats.tensors import fingerprint, read_metadata, write_atomically
from ldm.model import LatentDiffusion
from ldm.training.fit import fit
from ldm.training.stage import StageModule, seed_of
from ldm.vae import IdentityConfig
from ldm.vae.module import VAEModule, measure_latents

PART_FILE = "final.safetensors"
"""What the stages vae and clip leave in their folders."""


HOMES = {"vae": {"first_stage": ""}, "clip": CLIP_COMPONENTS}
"""Prefixes of a checkpoint's parts in what a stage trains; of the denoiser see :func:`part_prefixes`."""

FINGERPRINTED = {"first_stage": "vae", "text_encoder": "text", "text_encoder_2": "text_2", "image_encoder": "image"}
"""Names of parts in fingerprints, which stay what they were when the first runs wrote them."""


def result_file(experiment: Experiment, stage: str) -> Path:
    """The file that a finished stage leaves in the run folder."""
    return experiment.folder / MODEL_FILE if stage == "denoiser" else experiment.folder / stage / PART_FILE


def train_stage(experiment: Experiment, stage: str) -> Path:
    """Train one stage, or go on with it, and return the file that it leaves; a finished one is left as it is.

    Raises:
        TrainingError: a predecessor is missing, training was stopped, or the loss is not finite.
        CheckpointError: a predecessor does not fit the config, or has been trained anew since.
    """
    result = result_file(experiment, stage)
    torch.manual_seed(seed_of(experiment.seed, stage, "weights"))
    module = MAKE[stage](experiment)
    if _is_finished(result, module):
        return result
    write_config(experiment)
    if module.train_config.init and not (module.folder / "last.ckpt").is_file():
        _initialize(module, module.train_config.init)
    data = data_of(experiment, module)
    trainer = fit(module, data, experiment.trainer)
    if trainer.is_global_zero:
        with module.ema_weights():
            _write_result(result, module.eval(), data)
    trainer.strategy.barrier()
    return result


def make_vae(experiment: Experiment) -> VAEModule:
    """Stage 1, which has no predecessor."""
    config = experiment.vae
    assert config.train is not None
    return VAEModule(config, config.train, experiment.seed, experiment.folder / "vae")


def make_clip(experiment: Experiment) -> CLIPModule:
    """Stage 2, with the tokenizer of the run."""
    config, folder = experiment.clip, experiment.folder / "clip"
    assert config is not None
    assert config.train is not None
    tokenizer = _tokenizer(experiment, config.tokenizer, folder / "tokenizer.json")
    return CLIPModule(config, config.train, experiment.seed, folder, tokenizer)


def make_denoiser(experiment: Experiment) -> DenoiserModule:
    """Stage 3, with the first stage and the text tower that the stages before have left."""
    model, handoff = make_model(experiment)
    return DenoiserModule(experiment.denoiser, model, handoff, experiment.seed, experiment.folder / "denoiser")


MAKE = {"vae": make_vae, "clip": make_clip, "denoiser": make_denoiser}
"""The module of each stage, with its predecessors' weights in place."""


def make_model(experiment: Experiment) -> tuple[LatentDiffusion, dict[str, str]]:
    """The whole model as stage 3 begins with it, and the fingerprints of what it took from the stages before.

    Raises:
        TrainingError: a predecessor has not been trained.
        CheckpointError: it does not fit the config.
    """
    config, handoff = model_config(experiment), {}
    tokenizer, clip = None, None
    if experiment.clip is not None:
        clip = _predecessor(experiment, "clip", experiment.clip.checkpoint)
        tokenizer, handoff["clip"] = clip.tokenizer, _fingerprint(clip, *clip.encoders())
    conditioner = config.conditioner.with_tokenizer(
        lambda kind, name: _tokenizer(experiment, kind, experiment.folder / "denoiser" / f"tokenizer{name}.json")
    )
    model = LatentDiffusion(replace(config, conditioner=conditioner), tokenizer)
    if not isinstance(experiment.vae.model, IdentityConfig):
        vae = _predecessor(experiment, "vae", experiment.vae.checkpoint)
        _take(vae, "first_stage", model.first_stage)
        handoff["vae"] = _fingerprint(vae, "first_stage")
    if clip is not None:
        for name, tower in model.conditioner.pretrained_encoders():
            if name in clip.parts or not any(parameter.requires_grad for parameter in tower.parameters()):
                _take(clip, name, tower)  # else it is trained from nothing
    model.conditioner.load_pretrained()
    return model, handoff


def data_of(experiment: Experiment, module: StageModule) -> DataModule:
    """The batches of a stage; those of the denoiser are latents if the config asks for ``cache_latents``."""
    train, latents = module.train_config, None
    if isinstance(module, DenoiserModule) and experiment.data.cache_latents and "vae" in module.handoff:
        latents = LatentSource(module.model.first_stage, module.handoff["vae"], experiment.folder / "latents")
    return DataModule(
        experiment.data,
        train.batch_size,
        experiment.seed,
        train.max_steps * train.accumulate,
        latents=latents,
    )


def write_config(experiment: Experiment) -> None:
    """``config.yaml`` of the run folder: the experiment as it was resolved."""
    text = to_yaml(experiment)
    write_atomically(experiment.folder / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))


def _write_result(path: Path, module: StageModule, data: DataModule) -> None:
    provenance: dict[str, Any] = {
        "stage": module.stage,
        "steps": module.completed_steps,
        "seed": module.seed,
        "ldm": __version__,
        "handoff": module.handoff,
    }
    if isinstance(module, VAEModule):
        batches = EvaluationLoader(data.samples("train"), module.train_config.batch_size)
        measure_latents(module.first_stage, batches, module.device)
        save_module(path, FIRST_STAGE, module.first_stage, module.config.model, provenance=provenance)
    elif isinstance(module, CLIPModule):
        save_module(path, CLIP, module.clip, module.config.model, module.tokenizer, provenance)
    elif isinstance(module, DenoiserModule):
        save_model(path, module.model, provenance)


def _tokenizer(experiment: Experiment, kind: TokenizerConfig, path: Path) -> Tokenizer:
    """A tokenizer of the run: made from the training captions once, then read from ``path``."""
    if path.is_file():
        return Tokenizer.from_json(path.read_text(encoding="utf-8"))
    samples = experiment.data.open("train")
    tokenizer = kind.build(samples.annotations(np.arange(len(samples)))["text"])
    write_atomically(path, lambda temporary: temporary.write_text(tokenizer.to_json(), encoding="utf-8"))
    return tokenizer


def _predecessor(experiment: Experiment, stage: str, checkpoint: str | None) -> Checkpoint:
    """What a stage has left, or the source that the config names in its place."""
    path = result_file(experiment, stage)
    if checkpoint is None and not path.is_file():
        raise TrainingError(
            f"stage denoiser needs what stage {stage} leaves, but there is no {path}; "
            f"train it first (--stage {stage}, or --stage all) or name a source as {stage}.checkpoint."
        )
    return read(checkpoint or path)


def _take(source: Checkpoint, name: str, network: nn.Module) -> None:
    """Weights of a part of a source into a network of the same config."""
    _check_fit(source, name, network.config)
    load_strictly(network, source.part(name).state, source.source, torch.float32)


def _check_fit(source: Checkpoint, name: str, wanted: Any) -> None:
    """Refuse a part of a source that was built from another config, naming each field that differs.

    Raises:
        CheckpointError: it was, or the source has no such part.
    """
    section = {"first_stage": "vae.model", "denoiser": "denoiser.model"}.get(name, f"clip.model.{FINGERPRINTED.get(name)}")
    found, asked = _flat(to_dict(source.part(name).config)), _flat(to_dict(wanted))
    differing = [
        f"{section}.{field} is {asked.get(field)!r} here and {found.get(field)!r} there"
        for field in sorted(found.keys() | asked.keys())
        if found.get(field) != asked.get(field) and field != "dropout"  # which is of the training, not of the weights
    ]
    if differing:
        raise CheckpointError(f"{source.source} does not fit the config: {'; '.join(differing)}.")


def _fingerprint(source: Checkpoint, *names: str) -> str:
    """Of what a run takes from a source: that of the stage which left it, else of the parts themselves."""
    if source.kind in (CLIP, FIRST_STAGE):
        return source.fingerprint
    parts = {FINGERPRINTED[name]: source.part(name) for name in names}
    states = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state.items()}
    return fingerprint(states, {name: to_dict(part.config) for name, part in parts.items()})


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names to plain values."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        name: value
        for key, child in node.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()
    }


def _is_finished(result: Path, module: StageModule) -> bool:
    """Whether the stage's file is there, made from these predecessors, with as many steps as the config asks for."""
    if not result.is_file():
        return False
    provenance = json.loads(read_metadata(result).get("provenance", "{}"))
    if provenance.get("handoff") != module.handoff:
        raise CheckpointError(
            f"{result} was made from predecessors with the fingerprints {provenance.get('handoff')}, but those at hand have "
            f"{module.handoff}; move it and {module.folder} away to train the stage anew."
        )
    return provenance.get("steps", 0) >= module.train_config.max_steps


def _initialize(module: StageModule, source: str) -> None:
    """Weights of ``train.init``, a source of what the stage itself makes; what is not trained stays that of the predecessors."""
    network, found = module.trainable_module(), read(source)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in network.state_dict().items() if name not in trained}
    homes = part_prefixes(module.model) if isinstance(module, DenoiserModule) else HOMES[module.stage]
    for name, home in homes.items():
        prefix = f"{home}." if home else ""
        if any(each.startswith(prefix) for each in trained):
            _check_fit(found, name, network.get_submodule(home).config)
            own = ((f"{prefix}{key}", tensor) for key, tensor in found.part(name).state.items())
            state |= {key: tensor for key, tensor in own if key in trained}
    others = found.parts[OTHERS].state if OTHERS in found.parts else {}
    state |= {name: tensor for name, tensor in others.items() if name in trained}
    load_strictly(network, state, source, torch.float32)
