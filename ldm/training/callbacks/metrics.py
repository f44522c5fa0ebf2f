"""Logging of the metrics of training and validation."""

# mypy: disable-error-code="override"
# Lightning declares LightningModule, but these hooks only receive a StageModule.

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L

from ldm.config import to_dict
from ldm.data.buckets import Shape
from ldm.training.averages import Averages
from ldm.training.config import TrainerConfig
from ldm.training.engine import StageModule
from ldm.training.loggers import LoggedRun, Logger
from ldm.training.metrics import MetricsFile
from ldm.training.system_metrics import SystemMetrics


class Metrics(L.Callback):
    """Writer of the training metrics every ``log_every`` steps, and of each validation, to ``metrics.csv`` and the loggers.

    Checkpoints hold the sums since the last row, and the number of rows: a resumed training writes the rows of one that
    was never interrupted.

    Args:
        config: machine settings, with the loggers.
        count_flops: see :class:`SystemMetrics`.
    """

    def __init__(self, config: TrainerConfig, count_flops: Callable[[], Callable[[Shape], float]] | None = None):
        self.config, self.count_flops = config, count_flops
        self.averages = Averages()
        self.saved: dict[str, Any] | None = None  # state at the checkpoint from which training resumes
        self.file: MetricsFile | None = None  # on the first rank
        self.loggers: list[Logger] = []  # on the first rank

    def state_dict(self) -> dict[str, Any]:
        return {**self.averages.state_dict(), "rows": self.file.sync() if self.file else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        self.averages = Averages(module.device)
        if self.saved is not None:
            self.averages.load_state_dict(self.saved, first=trainer.is_global_zero)
        train, step = module.train_config, module.completed_steps
        self.system = SystemMetrics(
            module.device,
            self.config.precision_of(train),
            train.batch_size * train.accumulate * trainer.world_size,
            trainer.world_size,
            self.count_flops if trainer.is_global_zero else None,
        )
        self.system.restart(step, self._waited(trainer))
        if trainer.is_global_zero:
            run = LoggedRun(module.folder, module.stage, step, to_dict(module.settings))
            rows = self.saved["rows"] if self.saved is not None else None
            self.file = MetricsFile(module.folder / "metrics.csv", step, rows)
            self.loggers = [logger.open(run) for logger in self.config.loggers]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.averages.add(module.latest, module.latest_norms, module.latest_by_noise_level)
        if self.system.flops_of is not None:
            self.system.add(module.train_config.batch_size * trainer.world_size, _shape(module, batch))
        if not (module.is_optimizer_step(batch_idx) and module.is_due(module.train_config.log_every)):
            return
        step = module.completed_steps
        row = {f"train/{name}": value for name, value in self.averages.row().items()}
        row["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.write(step, row | self.system.row(step, self._waited(trainer)))

    def on_validation_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self.write(module.completed_steps, {f"val/{name}": value for name, value in module.validation.items()})
        self.system.restart(module.completed_steps, self._waited(trainer))

    def on_train_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, module: StageModule, exception: BaseException) -> None:
        self._close()

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Write a row; other ranks than the first write nothing."""
        if self.file is not None:
            self.file.write(step, row)
            for logger in self.loggers:
                logger.write(step, row)

    def _close(self) -> None:
        loggers, self.loggers = self.loggers, []
        for logger in loggers:
            logger.close()

    @staticmethod
    def _waited(trainer: L.Trainer) -> float:
        """Return the seconds for which the training has waited for data in this session."""
        return float(getattr(trainer.train_dataloader, "waited", 0.0))


def _shape(module: StageModule, batch: Mapping[str, Any]) -> Shape:
    """Return height and width in pixels of the images of a batch, which may be of latents."""
    if "image" in batch:
        height, width = batch["image"].shape[-2:]
        return height, width
    first_stage = module.task.frozen_first_stage
    assert first_stage is not None, "only a denoiser is trained on latents"
    height, width = batch[first_stage.posterior_type.cached[0]].shape[-2:]
    return height * first_stage.factor, width * first_stage.factor
