"""Training of one stage, from the results of the preceding ones to its own result file."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.config import to_yaml
from ldm.data.datamodule import DataModule, LatentSource
from ldm.formats.native import save_state
from ldm.formats.tensors import write_atomically
from ldm.training.engine import StageModule, seed_of
from ldm.training.experiment import Experiment
from ldm.training.fit import fit
from ldm.training.handoff import Handoff, initialize, is_finished, result_file
from ldm.training.modules import MODULES
from ldm.training.tasks import TASKS, VAETask


def train_stage(experiment: Experiment, stage: str) -> Path:
    """Train or resume a stage and return the path of its result; a finished stage is not changed.

    Raises:
        TrainingError: a predecessor is missing, training was stopped, or the loss is not finite.
        CheckpointError: a predecessor does not fit the config, or has been trained again since.
    """
    result = result_file(experiment, stage)
    module = build_module(experiment, stage)
    if is_finished(result, stage, module.train_config.max_steps, module.handoff):
        return result
    write_config(experiment)
    if module.train_config.init and not (module.folder / "last.ckpt").is_file():
        initialize(module.task, module.train_config.init)
    data = data_of(experiment, module)
    trainer = fit(module, data, experiment.trainer)
    module.to(trainer.strategy.root_device)  # Lightning moves it to the CPU when it ends
    export, state = module.export(data.samples)
    if trainer.is_global_zero:
        save_state(result, export.format, state, export.config, export.tokenizer, module.provenance())
    trainer.strategy.barrier()
    return result


def build_module(experiment: Experiment, stage: str) -> StageModule:
    """Build the module of a stage, with the weights of its predecessors in place.

    Raises:
        TrainingError: a predecessor has not been trained.
        CheckpointError: a predecessor does not fit the config.
    """
    torch.manual_seed(seed_of(experiment.seed, stage, "weights"))
    handoff = Handoff(experiment, stage)
    task, train = TASKS[stage].build(experiment, handoff), getattr(experiment, stage).train
    assert train is not None, f"the experiment does not train stage {stage}"
    return MODULES.get(stage, StageModule)(
        task, train, handoff.fingerprints, experiment.seed, experiment.folder / stage
    )


def data_of(experiment: Experiment, module: StageModule) -> DataModule:
    """Return the batches of a stage; latents in place of images if the config asks for ``cache_latents``."""
    train, first_stage, latents = module.train_config, module.task.frozen_first_stage, None
    if experiment.data.cache_latents and first_stage is not None:
        latents = LatentSource(first_stage, module.handoff[VAETask.stage], experiment.folder / "latents")
    return DataModule(
        experiment.data,
        train.batch_size,
        experiment.seed,
        train.max_steps * train.accumulate,
        latents=latents,
    )


def write_config(experiment: Experiment) -> None:
    """Write the resolved experiment to ``config.yaml`` in the run folder."""
    text = to_yaml(experiment)
    write_atomically(experiment.folder / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
