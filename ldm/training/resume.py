"""What ``last.ckpt`` records of its training, and the check that a training with the present config can continue it.

A changed field either holds from the step of the checkpoint on, or is refused: it is taken over if its dataclass declares it
``changeable`` (:func:`ldm.config.config_field`), and every other field must keep its value. Checkpoints of earlier versions
have no record and are accepted.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.config import Kind, from_dict, to_dict
from ldm.errors import CheckpointError, first_line, some
from ldm.formats.native import check_names
from ldm.formats.sharded_checkpoint import damaged_tensor, is_sharded, load_sharded
from ldm.formats.training_checkpoint import earlier_checkpoints, resume_points
from ldm.training.ema import not_finite
from ldm.training.tasks import image_towers

if TYPE_CHECKING:
    from ldm.data.datamodule import DataModule
    from ldm.training.engine import StageModule
    from ldm.training.experiment import Experiment


def settings_of(experiment: Experiment, stage: str) -> dict[str, Any]:
    """Return the sections of an experiment on which the training of a stage depends, by name."""
    return {stage: getattr(experiment, stage), "data": experiment.data_of(stage), "seed": experiment.seed}


def differences(before: Any, now: Any, where: str = "", changeable: bool = False) -> Iterator[str]:
    """Yield a phrase for each field that differs between two configs of one type.

    Args:
        before, now: the configs, or mappings of configs.
        where: dotted name of the section.
        changeable: True to include the fields that a resumed training takes over.
    """
    if isinstance(now, Mapping):
        pairs = {str(name): (before[name], config) for name, config in now.items() if name in before}
    elif dataclasses.is_dataclass(now) and type(before) is type(now):
        fields = [each for each in dataclasses.fields(now) if changeable or not each.metadata.get("changeable")]
        pairs = {each.name: (getattr(before, each.name), getattr(now, each.name)) for each in fields}
    elif isinstance(now, tuple) and isinstance(before, tuple) and len(now) == len(before) and _are_configs(now):
        pairs = {str(i): pair for i, pair in enumerate(zip(before, now, strict=True))}
    else:
        if before != now or type(before) is not type(now):  # 1 is a step and 1.0 a fraction
            yield f"{where} was {_shown(before)} and is now {_shown(now)}"
        return
    for name, (old, new) in pairs.items():
        yield from differences(old, new, f"{where}.{name}" if where else name, changeable)


def recorded_settings(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the training that wrote a checkpoint, as configs of the types in ``now``; empty if unknown."""
    record = checkpoint.get("settings", {})
    return {
        name: from_dict(_family(config), record[name], name) if dataclasses.is_dataclass(config) else record[name]
        for name, config in now.items()
        if name in record
    }


def read_checkpoint(path: Path, instead: str) -> dict[str, Any]:
    """Read a checkpoint of a training, memory-mapped; ``instead`` tells what to do if it cannot be read.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        if is_sharded(path):
            return load_sharded(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle may raise any exception
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); {instead}.") from None


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint from which a training resumes."""

    path: Path
    steps: int
    """Completed steps."""
    best: float | None
    """Score of ``best.ckpt`` at that time."""
    warnings: tuple[str, ...]
    """Sentences on newer checkpoints that are not used, and on missing ones."""
    abandons: bool = False
    """True if steps after it will not be repeated as they were, so that what is left of them is deleted."""


def read_intact(path: Path, instead: str) -> dict[str, Any]:
    """Read a checkpoint like :func:`read_checkpoint`, and compare all of it with its checksums, at about 2 GB/s.

    Raises:
        CheckpointError: it is damaged.
    """
    checkpoint = read_checkpoint(path, instead)
    try:
        # torch.save writes a zip file with a CRC-32 of each tensor
        broken = damaged_tensor(path) if is_sharded(path) else _damaged_record(path)
    except Exception as error:  # damaged headers may raise any exception
        raise CheckpointError(f"{path} is damaged ({first_line(error)}); {instead}.") from None
    if broken:
        raise CheckpointError(f"{path} is damaged (the checksum of {broken} is wrong); {instead}.")
    return checkpoint


def _damaged_record(path: Path) -> str | None:
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def resume_point(module: StageModule, data: DataModule) -> ResumePoint | None:
    """Return the newest intact checkpoint of the stage; None if there is none at all.

    If ``max_steps`` was raised after the final decay of a learning rate had begun, it is the newest one from before the decay.

    Raises:
        CheckpointError: all are damaged; or the newest intact one holds weights that are not finite, belongs to another model,
            trains other parts of it, was trained on other predecessors, image towers or images, with fields that must not
            change, or for more steps.
    """
    paths, problems = resume_points(module.folder), []
    decayed: tuple[Path, int, dict[str, Any]] | None = None  # the newest of those whose learning rate had decayed
    for path, following in itertools.zip_longest(paths, paths[1:]):
        next_one = following or (decayed and decayed[0])
        instead = f"the training resumes from {next_one}" if next_one else "delete it to restart the stage"
        try:
            checkpoint = read_intact(path, instead)
        except CheckpointError as error:
            problems.append(error)
            continue
        steps = _check(module, data, path, checkpoint)
        if _has_decayed(module, checkpoint):
            decayed = decayed or (path, steps, checkpoint)
            continue
        best = _best_score(module, data, checkpoint, repeated=decayed is None)
        if decayed is None:
            return ResumePoint(path, steps, best, tuple(map(str, problems)))
        reason = (
            f"max_steps was raised, so the training resumes from {path}, the newest checkpoint before the decay of the learning "
            f"rate, and not from {decayed[0]} (step {decayed[1]:,})."
        )
        return ResumePoint(path, steps, best, (*map(str, problems), reason), abandons=True)
    if decayed is not None:
        path, steps, checkpoint = decayed
        reason = (
            f"max_steps was raised, but the learning rate of {path} has begun to decay, and there is no intact checkpoint "
            "from before that; the training resumes from it."
        )
        return ResumePoint(path, steps, _best_score(module, data, checkpoint), (*map(str, problems), reason))
    if len(problems) > 1:
        names = some([path.name for path in paths])
        raise CheckpointError(
            f"all checkpoints in {module.folder} are damaged ({names}); restore one of them, or delete them to restart the stage."
        )
    if problems:
        raise problems[0]
    return None


def _has_decayed(module: StageModule, checkpoint: Mapping[str, Any]) -> bool:
    """Return True if the final decay of the learning rate, for fewer steps than those of the config, had begun."""
    section = recorded_settings(checkpoint, module.settings).get(module.stage)
    if section is None or section.train.max_steps >= module.train_config.max_steps:
        return False
    stable: int | None = section.train.stable_steps
    return stable is not None and checkpoint["completed_steps"] > stable


def _best_score(
    module: StageModule, data: DataModule, checkpoint: Mapping[str, Any], repeated: bool = True
) -> float | None:
    """Return the score of ``best.ckpt`` when a checkpoint was saved; None if it was on other validation data, or is lost.

    If it is of a later step, that step will write it again, unless later steps are not ``repeated`` as they were.
    """
    path = module.folder / "best.ckpt"
    if not path.exists():
        return None
    try:
        best: Mapping[str, Any] = read_checkpoint(path, "the next validation writes it again")
    except CheckpointError as error:
        warnings.warn(str(error), stacklevel=2)
        return None
    if best["completed_steps"] > checkpoint["completed_steps"]:
        if not repeated:
            return None
        best = checkpoint
    val = data.fingerprints().get("val")
    same = best.get("samples", {}).get("val", val) == val
    score: float | None = best["callbacks"]["Checkpoints"]["best"] if same else None
    return score


def _check(module: StageModule, data: DataModule, last: Path, checkpoint: Mapping[str, Any]) -> int:
    """Return the completed steps of a checkpoint that the training can continue; see :func:`resume_point`."""
    for name, mark in module.handoff.items():
        if checkpoint["handoff"].get(name) != mark:
            raise CheckpointError(
                f"{last} was trained on the {name} with fingerprint {checkpoint['handoff'].get(name)}, but the current one has "
                f"{mark}; delete {module.folder} to train the stage on it, or restore the old one."
            )
    for name, mark in image_towers.recorded_fingerprints(module.task, checkpoint).items():
        if (current := module.tower_fingerprints.get(name, mark)) != mark:
            raise CheckpointError(
                f"{last} was trained with an image tower of {name} with fingerprint {mark}, but its file now holds one with "
                f"{current}; restore the old file, or delete {module.folder} to restart the stage."
            )
    check_names(module.task, image_towers.added(module.task, checkpoint["state_dict"]), last)
    groups = [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    before, now = sum(len(group["params"]) for group in groups), sum(p.requires_grad for p in module.parameters())
    if before != now:
        raise CheckpointError(
            f"{last} trains {before} tensors of the networks, but the config has {now} trainable tensors; undo the change "
            f"(conditioner.trainable?), or delete {module.folder} to restart the stage."
        )
    if broken := not_finite({**checkpoint["state_dict"], **checkpoint.get("ema", {}).get("average", {})}):
        best = last.with_name("best.ckpt")
        instead = f"copy {best} to it to go on from there, or " if best.exists() else ""
        older = [path for path in earlier_checkpoints(last.parent) if path != last]
        delete = f"resume from {older[0]}" if older else "restart the stage"
        raise CheckpointError(
            f"{last}: the weight {broken} holds NaN or infinite values; {instead}delete it to {delete}."
        )
    changes = list(differences(recorded_settings(checkpoint, module.settings), module.settings))
    fingerprint = data.fingerprints()["train"]
    same = checkpoint.get("samples", {}).get("train", fingerprint) == fingerprint
    if not same and not any(change.startswith("data.") for change in changes):  # which may be why
        changes.append("the images or captions of data.train are not those that it was trained on")
    if changes:
        raise CheckpointError(
            f"{last} cannot be continued with this config: {'; '.join(changes)}. Undo the change, or give another run_dir."
        )
    steps, wanted = int(checkpoint["completed_steps"]), module.train_config.max_steps
    if steps > wanted:
        raise CheckpointError(
            f"{last} has completed {steps} steps, more than {module.stage}.train.max_steps, which is {wanted}; raise it, or "
            "give another run_dir."
        )
    return steps


def report_changes(module: StageModule, result: Path) -> None:
    """Warn if a stage was finished with other hyperparameters than those of the config, which have no effect any more.

    Raises:
        CheckpointError: its model is another than that of the config.
    """
    now = {module.stage: module.settings[module.stage]}
    try:
        before = recorded_settings(read_checkpoint(module.folder / "last.ckpt", ""), now)
    except CheckpointError:  # a finished stage does not need it
        return
    others = [change for change in differences(before, now) if not change.startswith(f"{module.stage}.train.")]
    if others:
        raise CheckpointError(
            f"{result} was trained with another config: {'; '.join(others)}. Undo the change, or give another run_dir."
        )
    changes = list(differences(before, now, changeable=True))
    if changes:
        warnings.warn(
            f"stage {module.stage} is finished, and these changes have no effect: {'; '.join(changes)}. To train it again, give "
            f"another run_dir; to train it further, raise {module.stage}.train.max_steps.",
            stacklevel=3,
        )


def _are_configs(values: tuple[Any, ...]) -> bool:
    return all(map(dataclasses.is_dataclass, values))


def _family(config: Any) -> type[Any]:
    """Return the type to read a config by: the family of a kind, or the dataclass itself."""
    return next((base for base in type(config).__mro__ if Kind in base.__bases__), type(config))


def _shown(value: Any) -> str:
    return str(value.kind) if isinstance(value, Kind) else repr(to_dict(value))
