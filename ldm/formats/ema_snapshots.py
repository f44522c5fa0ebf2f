"""Snapshots of averaged weights, from which an average of any length is made after the training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import CheckpointError, warn
from ldm.formats import native
from ldm.formats.tensors import fingerprint, read_file, read_metadata, read_tensors, write_tensors
from ldm.formats.training_checkpoint import MODEL_STAGE, step_of
from ldm.nn.power_profiles import LONGEST, Profile, coefficients, distance

FOLDER = "ema_snapshots"
"""Name of the folder of the snapshots, in that of the stage."""

INEXACT = 0.05
"""Relative distance of profiles from which a warning is given."""


def write_snapshot(stage: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Write the averages of a step, by length, into the folder of a stage."""
    tensors = {f"{length:g}/{name}": each for length, average in averages.items() for name, each in average.items()}
    path = stage / FOLDER / f"step_{step:07d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"step": str(step), "lengths": json.dumps(sorted(averages))})


def snapshots(stage: Path) -> list[Path]:
    """Return the snapshots of a stage in the order of their steps."""
    return sorted((stage / FOLDER).glob("step_*[0-9].safetensors"), key=step_of)


def reconstructed(stage: Path, length: float, last: int | None = None) -> tuple[dict[str, Tensor], int]:
    """Return the average of a length and its step, that of the newest snapshot until step ``last``.

    Sums are in fp64; the memory needed is twice that of the weights.

    Raises:
        CheckpointError: the length is out of range, or there is no snapshot.
    """
    if not 0 < length < LONGEST:
        raise CheckpointError(f"the length of the average is {length:g}; it must be above 0 and below {LONGEST:.4f}.")
    paths = [path for path in snapshots(stage) if last is None or step_of(path) <= last]
    if not paths:
        raise CheckpointError(
            f"{stage} holds no snapshot of averaged weights; train the stage with the section train.ema_snapshots."
        )
    stored = [(path, Profile(step_of(path), each)) for path in paths for each in _lengths(path)]
    target, profiles = Profile(step_of(paths[-1]), length), [each for _, each in stored]
    factors = coefficients(profiles, target)
    if (error := distance(profiles, factors, target)) > INEXACT:
        warn(
            f"the average that {len(paths)} snapshots in {stage} give has a profile {error:.0%} off that of length {length:g}; "
            "choose another length, or train with a smaller ema_snapshots.every."
        )
    total: dict[str, Tensor] = {}
    for (path, profile), factor in zip(stored, factors, strict=True):
        prefix = f"{profile.length:g}/"
        for name, tensor in read_tensors(path).items():
            if name.startswith(prefix):
                share = float(factor) * tensor.double()
                key = name.removeprefix(prefix)
                total[key] = total[key].add_(share) if key in total else share
    return {name: each.to(torch.float32) for name, each in total.items()}, target.step


def _lengths(path: Path) -> list[float]:
    lengths: list[float] = json.loads(read_metadata(path)["lengths"])
    return lengths


def write_model(source: Path, length: float, target: Path) -> None:
    """Write a native file of a training with averaged weights of another length.

    Args:
        source: result of a training, or checkpoint of a training, in its run folder.
        length: standard deviation of the profile as a share of the training.
        target: path of the file.

    Raises:
        CheckpointError: the length is out of range, there is no snapshot, or the snapshots do not belong to the source.
    """
    own = source.parent / FOLDER
    stage = source.parent if own.is_dir() else source.parent / MODEL_STAGE
    tensors, metadata = read_file(source)
    if metadata.get("format") == native.FIRST_STAGE:
        raise CheckpointError(
            f"{source} is a first stage, whose latent statistics were measured with its own average; choose ema_decay instead."
        )
    provenance = json.loads(metadata.get("provenance", "{}"))
    average, step = reconstructed(stage, length, provenance.get("steps"))
    if strange := sorted(average.keys() - tensors.keys()):
        raise CheckpointError(f"the snapshots in {stage} have the weight {strange[0]}, which {source} has not.")
    tensors = {name: average[name].to(each.dtype) if name in average else each for name, each in tensors.items()}
    provenance |= {"steps": step, "ema_length": length}
    metadata = {name: text for name, text in metadata.items() if name in ("format", "config", "tokenizer")}
    metadata["provenance"] = json.dumps(provenance)
    metadata["fingerprint"] = fingerprint(tensors, native.fingerprinted_metadata(metadata))
    write_tensors(target, tensors, metadata)
