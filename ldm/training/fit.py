"""Lightning's trainer, configured so that the same call resumes a stage where the last one stopped."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ldm.data.buckets import Shape
from ldm.data.datamodule import DataModule
from ldm.data.stream import worker_death
from ldm.devices import usual_torch_state
from ldm.training.bad_samples import BadSamples
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.callbacks.ema_snapshots import EMASnapshots
from ldm.training.callbacks.interruption import Interruption
from ldm.training.callbacks.metrics import Metrics
from ldm.training.callbacks.previews import Previews
from ldm.training.callbacks.progress import Progress, Trial
from ldm.training.callbacks.sessions import Sessions
from ldm.training.callbacks.validation import Validation
from ldm.training.checkpoint_io import CheckpointFiles
from ldm.training.config import TrainerConfig
from ldm.training.engine import StageModule
from ldm.training.launch import devices_and_nodes, strategy_of
from ldm.training.resume import resume_point

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def is_first_process() -> bool:
    """Return True on the first rank, also before and after the training."""
    # Before the training, Lightning does not count the machines if it starts their processes itself.
    return getattr(rank_zero_only, "rank", 0) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def _plugins() -> list[Any]:
    """Return the plugins of the trainer; under SLURM, signals are left to :class:`Interruption`."""
    detected = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()  # the order in which Lightning looks
    slurm = [SLURMEnvironment(auto_requeue=False)] if detected else []
    return [CheckpointFiles(), *slurm]


@usual_torch_state()
def fit(
    module: StageModule,
    data: DataModule,
    config: TrainerConfig,
    begin: Callable[[], object] = lambda: None,
    count_flops: Callable[[], Callable[[Shape], float]] | None = None,
) -> L.Trainer:
    """Train a stage to its last step, from its newest intact checkpoint if there is one.

    Args:
        module: the stage, with its initial weights.
        data: its training loader holds the batches of the complete run and can start at any of them.
        config: machine settings.
        begin: called by the first rank before the first step, after the settings were tried.
        count_flops: counts floating-point operations, see :class:`ldm.training.system_metrics.SystemMetrics`.

    Raises:
        CheckpointError: the checkpoint cannot be continued; see :func:`ldm.training.resume.resume_point`.
        ConfigError: the package of a logger is not installed.
        Interrupted: a signal stopped the training.
        TrainingError: Ctrl-C stopped it, the loss is not finite, a checkpoint cannot be written, a logger cannot be used, or
            too many samples are bad.
        DataError: a shard cannot be read, or a process that reads data has ended.
    """
    for logger in config.loggers:
        logger.check()
    module.train_config.optimizer.check()
    train, start = module.train_config, resume_point(module, data)
    for problem in start.warnings if start and is_first_process() else ():
        warnings.warn(problem, stacklevel=2)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.compile:
        module.task.compile_networks()
    module.shared_draws = config.shared_draws
    devices, num_nodes = devices_and_nodes(config)
    checkpoints = Checkpoints(start)
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy_of(config, module.task.leaves_out_parameters),
        precision=PRECISIONS[config.precision_of(train)],
        max_epochs=1,  # one epoch of the training stream is the complete run
        val_check_interval=train.max_steps * train.accumulate + 1,  # never; see Validation
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if data.validates else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=module.folder,
        plugins=_plugins(),
        # The order after each step: an interruption saves the step before its previews and validation, a checkpoint after them.
        callbacks=[
            Trial(begin),
            BadSamples(),
            Sessions(config),
            Metrics(config, count_flops),
            Progress(),
            Interruption(checkpoints),
            EMASnapshots(),
            Previews(),
            Validation(),
            checkpoints,
        ],
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start.path if start else None, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to a second Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise
    except RuntimeError as error:  # torch raises it wherever the process is when a worker ends
        death = worker_death(error)
        if death is None:
            raise
        raise death from None
    return trainer
