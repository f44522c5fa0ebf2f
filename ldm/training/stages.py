"""Training of one stage, from the results of the preceding ones to its own result file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.config import to_yaml
from ldm.data.datamodule import DataModule, Encoded, LatentSource
from ldm.data.filters import DATA_FILE
from ldm.data.order_table import order_table
from ldm.devices import usual_torch_state
from ldm.errors import ConfigError, DivergedError
from ldm.formats.native import save_state
from ldm.formats.tensors import write_atomically
from ldm.formats.training_checkpoint import resume_points
from ldm.nn.gradient_checkpointing import set_gradient_checkpointing
from ldm.processes import interruptible
from ldm.training.costs import flops_by_shape
from ldm.training.encoders import encoded_source
from ldm.training.engine import StageModule, seed_of
from ldm.training.experiment import Experiment, load_config
from ldm.training.fit import fit, is_first_process
from ldm.training.handoff import Handoff, add_tiny_decoder, initialize, is_finished, result_file
from ldm.training.lock import locked
from ldm.training.modules import MODULES
from ldm.training.resume import report_changes, settings_of
from ldm.training.tasks import TASKS, DecoderTask, DenoiserTask, VAETask


@usual_torch_state()
def train_stage(experiment: Experiment, stage: str) -> Path:
    """Train or resume a stage and return the path of its result; a finished stage is not changed.

    Raises:
        TrainingError: a predecessor is missing, another process trains the stage, training was stopped, or the loss or the
            weights are not finite.
        Interrupted: a signal stopped the training.
        CheckpointError: a predecessor does not fit the config, or has been trained again since; or the stage cannot be
            resumed with this config.
    """
    with interruptible(f"stage {stage}"):
        result = result_file(experiment, stage)
        module, files = _build(experiment, stage)
        if is_finished(result, stage, module.train_config.max_steps, module.handoff):
            report_changes(module, result)
        else:
            with locked(module.folder) if is_first_process() else nullcontext():
                _train(experiment, module, files, result)
        if stage in (DenoiserTask.stage, DecoderTask.stage) and is_first_process():
            add_tiny_decoder(experiment)
        return result


def _train(experiment: Experiment, module: StageModule, files: Mapping[Path, str], result: Path) -> None:
    """Train a stage to its end, with ``files`` in the run folder, and write its result."""

    def begin() -> None:

        for path, text in files.items():
            _write_text(path, text)
        write_config(experiment, module.stage)
        selections = data.selections()
        for split, selection in selections.items():
            for line in selection.describe(split):
                tqdm.write(line)
        content = {split: selection.to_dict() for split, selection in selections.items()}
        _write_text(experiment.folder / DATA_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        for line in order_table(data.samples("train"), module.train_config.batch_size * module.world_size):
            tqdm.write(line)

    if module.train_config.init and not resume_points(module.folder):
        initialize(module.task, module.train_config.init)
    data = data_of(experiment, module)
    trainer = fit(module, data, experiment.trainer, begin, partial(flops_by_shape, experiment, module.stage))
    module.to(trainer.strategy.root_device)  # Lightning moves it to the CPU when it ends
    export, state, broken = module.export(data.samples)
    if broken:
        raise DivergedError(
            f"the weight {broken} of the finished stage {module.stage} holds NaN or infinite values, so {result} is not written; "
            f"train the stage again with a lower {module.stage}.train.learning_rate, in another run_dir."
        )
    if trainer.is_global_zero:
        save_state(result, export.format, state, export.config, export.tokenizer, module.provenance())
    trainer.strategy.barrier()


@usual_torch_state()
def build_module(experiment: Experiment, stage: str) -> StageModule:
    """Build the module of a stage, with the weights of its predecessors in place.

    Raises:
        TrainingError: a predecessor has not been trained.
        CheckpointError: a predecessor does not fit the config.
    """
    return _build(experiment, stage)[0]


def _build(experiment: Experiment, stage: str) -> tuple[StageModule, Mapping[Path, str]]:
    """Build the module of a stage, and the texts of the files that its folder gets."""
    torch.manual_seed(seed_of(experiment.seed, stage, "weights"))
    handoff = Handoff(experiment, stage)
    task, train = TASKS[stage].build(experiment, handoff), getattr(experiment, stage).train
    assert train is not None, f"the experiment does not train stage {stage}"
    set_gradient_checkpointing(task, train.gradient_checkpointing)
    module = MODULES.get(stage, StageModule)(
        task, train, handoff.fingerprints, experiment.seed, experiment.folder / stage, settings_of(experiment, stage)
    )
    return module, handoff.files


def data_of(experiment: Experiment, module: StageModule) -> DataModule:
    """Return the batches of a stage; with cached latents if the config asks for encoded data or ``cache_latents``."""
    train, first_stage = module.train_config, module.task.frozen_first_stage
    latents: Encoded | None = None
    if isinstance(module.task, DenoiserTask) and experiment.data.encoded.folder is not None:
        model, teacher = module.task.model, module.task.teacher
        latents = encoded_source(experiment, model.first_stage, model.conditioner, module.handoff, teacher)
    elif experiment.data.cache_latents and first_stage is not None:
        task, folder = module.task, experiment.folder / "latents"
        latents = LatentSource(
            first_stage, module.handoff[VAETask.stage], folder, with_images=task.needs_images, teacher=task.teacher
        )
    return DataModule(
        experiment.data_of(module.stage),
        train.batch_size,
        experiment.seed,
        train.max_steps * train.accumulate,
        latents=latents,
    )


def write_config(experiment: Experiment, stage: str) -> None:
    """Write the resolved experiment to ``config.yaml`` in the run folder, when the training of ``stage`` begins.

    Hyperparameters of other stages that were trained in this folder stay as they are there.
    """
    path = experiment.folder / "config.yaml"
    with suppress(ConfigError):  # there is none, or one that this version does not read
        before = load_config(path)
        for other in set(experiment.stages) - {stage}:
            section, trained = getattr(experiment, other), getattr(before, other)
            if resume_points(experiment.folder / other) and trained and trained.train:
                section = replace(section, train=trained.train, loss=trained.loss)
                experiment = replace(experiment, **{other: section})
    _write_text(path, to_yaml(experiment))


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
