"""Lightning's trainer, configured so that the same call resumes a stage where the last one stopped."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from ldm.data.datamodule import DataModule
from ldm.errors import CheckpointError, first_line
from ldm.formats.native import check_names
from ldm.training.callbacks import Checkpoints, Metrics, Previews, Progress
from ldm.training.config import TrainerConfig
from ldm.training.engine import StageModule

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def completed_steps(module: StageModule) -> int:
    """Return the number of steps in the ``last.ckpt`` of the stage; 0 if there is none.

    Raises:
        CheckpointError: it cannot be read, belongs to another model, trains other parts of it, or was trained on other
            predecessors.
    """
    last = module.folder / "last.ckpt"
    if not last.is_file():
        return 0
    try:
        checkpoint = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f"{last} cannot be read ({reason}); delete it to restart the stage.") from None
    for name, mark in module.handoff.items():
        if checkpoint["handoff"].get(name) != mark:
            raise CheckpointError(
                f"{last} was trained on the {name} with fingerprint {checkpoint['handoff'].get(name)}, but the current one has "
                f"{mark}; delete {module.folder} to train the stage on it, or restore the old one."
            )
    check_names(module.task, checkpoint["state_dict"], last)
    groups = [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    before, now = sum(len(group["params"]) for group in groups), sum(p.requires_grad for p in module.parameters())
    if before != now:
        raise CheckpointError(
            f"{last} trains {before} tensors of the networks, but the config has {now} trainable tensors; undo the change "
            f"(conditioner.trainable?), or delete {module.folder} to restart the stage."
        )
    return int(checkpoint["completed_steps"])


def _strategy(config: TrainerConfig, module: StageModule) -> str:
    """Return the strategy of the config; with several devices, DDP must expect unused parameters if there are two optimizers.

    The step of one optimizer leaves the parameters of the other without gradients.
    """
    several = (torch.cuda.device_count() if config.devices == "auto" else config.devices) > 1
    if several and len(module.specs) > 1 and config.strategy in ("auto", "ddp"):
        return "ddp_find_unused_parameters_true"
    return config.strategy


def fit(module: StageModule, data: DataModule, config: TrainerConfig) -> L.Trainer:
    """Train a stage to its last step, from ``last.ckpt`` if there is one.

    Args:
        module: the stage, with its initial weights.
        data: its training loader holds the batches of the complete run and can start at any of them.
        config: machine settings.

    Raises:
        TrainingError: training was stopped before the last step, or the loss is not finite.
    """
    train, start = module.train_config, completed_steps(module)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.compile:
        module.task.compile_networks()
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=_strategy(config, module),
        precision=PRECISIONS[config.precision_of(train)],
        max_epochs=1,  # one epoch of the training stream is the complete run
        val_check_interval=min(train.validate_every, train.max_steps) * train.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if data.validates else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=module.folder,
        callbacks=[Metrics(), Progress(), Previews(), Checkpoints()],
    )
    trainer.fit(module, datamodule=data, ckpt_path=module.folder / "last.ckpt" if start else None, weights_only=True)
    return trainer
