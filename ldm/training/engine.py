"""Engine: the LightningModule that optimizes, averages, validates, previews and checkpoints a task."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from ldm import __version__
from ldm.config import to_dict
from ldm.errors import DivergedError
from ldm.formats.native import metadata_of
from ldm.formats.training_checkpoint import MODULE, RECORD
from ldm.nn.ranks import BatchGenerator, mean_over_ranks
from ldm.training.config import TrainConfig
from ldm.training.ema import EMA, PowerEMA, not_finite
from ldm.training.gradient_clipping import clip_gradients
from ldm.training.optimizers import set_learning_rate
from ldm.training.sharded_tensors import gathered
from ldm.training.tasks import Task, image_towers
from ldm.training.tasks.task import Export, Preview, Splits, Step, TrainLoss
from ldm.training.trial import evaluation_mode, infinite_loss, try_settings

NAMED = 16
"""Number of samples of a batch that an error message names."""


def seed_of(*key: int | str) -> int:
    """Return a seed that depends on ``key`` alone."""
    return zlib.crc32("/".join(map(str, key)).encode())


class StageModule(L.LightningModule):
    """A task under Lightning.

    Its state dict is that of the task without its image towers. Steps are counted here (``completed_steps``), since Lightning
    counts those of all optimizers together. All methods are called on all ranks; files are written elsewhere, by the first rank.

    Args:
        task: networks and losses, with their initial weights.
        config: hyperparameters of the training.
        handoff: fingerprints of the preceding stages whose weights the task uses, by stage.
        seed: seed of the experiment; the random numbers of a step depend on it, the stage and the step.
        folder: folder of the stage in the run folder.
        settings: sections of the experiment that checkpoints record; see :func:`ldm.training.resume.settings_of`.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        handoff: Mapping[str, str],
        seed: int,
        folder: Path,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__()
        self.automatic_optimization = False
        self.task = task
        self.stage = task.stage
        self.specs = task.optimizers()
        self.train_config = config
        self.handoff = dict(handoff)
        self.seed = seed
        self.folder = folder
        self.settings = settings
        self.tower_fingerprints = image_towers.fingerprints(task)
        self.completed_steps = 0
        self.interrupted = (
            False  # True if what is due after the newest step, previews and validation, has not been made
        )
        self.verified_steps = -1  # steps after which the weights were last verified
        self.gradient_norm: Tensor | None = None  # of the newest optimizer step, until it is checked
        self.ema: EMA | None = None
        self.power_averages: list[PowerEMA] = []  # of train.ema_snapshots
        self.latest: dict[str, Tensor | float] = {}  # metrics of the newest training batch
        self.latest_norms: dict[str, Tensor] = {}  # its gradient norms before clipping, if it ended an optimizer step
        self.latest_by_noise_level: dict[str, tuple[Tensor, Tensor]] = {}  # its metrics by noise level
        self.validation: dict[str, float] = {}  # metrics of the newest validation
        self.results: list[Mapping[str, Tensor]] = []  # results of the batches of the current validation
        self.shared_draws = True  # see TrainerConfig.shared_draws

    # Randomness

    def generator(self, *key: int | str) -> BatchGenerator:
        """Return a generator that depends on the seed, the stage and ``key`` alone; a resumed run draws the same numbers."""
        generator = BatchGenerator("cpu")
        generator.manual_seed(seed_of(self.seed, self.stage, *key))
        return generator

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self._trainer is not None else 1

    def step(self, *key: int | str) -> Step:
        """Return the record of the current step, with the generator of ``key``, the same on all ranks."""
        return self._step(self.generator(*key))

    def _step(self, generator: torch.Generator, of_all_ranks: torch.Generator | None = None) -> Step:
        return Step(self.completed_steps, self.seed, generator, self.global_rank, self.world_size, of_all_ranks)

    def batch_step(self, *key: int | str, rows: range | None = None, size: int | None = None) -> Step:
        """Return the record of the current step for a batch that is divided among the ranks.

        Args:
            key: key of the generator.
            rows: which rows of the batch this rank computes; None = those of a training batch.
            size: number of its rows on all ranks, if ``rows`` is given.
        """
        count = self.train_config.batch_size
        rows = range(self.global_rank * count, (self.global_rank + 1) * count) if rows is None else rows
        shared = self.shared_draws and self.world_size > 1
        generator = self.generator(*key, 0 if shared else self.global_rank)
        if shared:
            generator.start, generator.total = rows.start, size or self.world_size * count
        alike = shared or self.world_size == 1
        return self._step(generator, None if alike else self.generator(*key, "all ranks"))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed = seed_of(self.seed, self.stage, "dropout", batch_idx, self.global_rank)
        if self.device.type == "cpu":  # torch.manual_seed takes a millisecond to seed absent devices too
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    # Optimization

    def configure_model(self) -> None:
        """Shard the networks, if the strategy does; else convert the weights of convolutions to channels_last."""
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is not None:
            shard(self.task)  # of contiguous parameters only
        else:
            self.task.to(memory_format=torch.channels_last)

    def configure_optimizers(self) -> Any:
        config = self.train_config
        return [config.optimizer.build(spec.modules, config) for spec in self.specs]

    def is_optimizer_step(self, batch_index: int) -> bool:
        """Return True if the optimizers step after this batch (gradients are accumulated over ``accumulate`` batches)."""
        return (batch_index + 1) % self.train_config.accumulate == 0

    def is_due(self, every: int) -> bool:
        """Return True if the newest step is a multiple of ``every`` or the last one."""
        return self.completed_steps % every == 0 or self.completed_steps == self.train_config.max_steps

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        step, due = self.batch_step("train", batch_idx), self.is_optimizer_step(batch_idx)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        losses = self.task.losses(batch, step)
        self.latest, self.latest_norms, self.latest_by_noise_level = {}, {}, {}
        for index, (spec, optimizer) in enumerate(zip(self.specs, optimizers, strict=True)):
            if step.number < spec.start:
                continue
            with self._only_trainable(index):
                loss = next(losses)
                value, metrics = self._over_ranks(loss)
                self.latest[spec.name] = self._finite(value, loss.value, batch)
                self.latest |= metrics
                self.latest_by_noise_level |= loss.by_noise_level
                self._backward(loss.value / self.train_config.accumulate, sync=due)
                if due:
                    optimizer.step()
                    optimizer.zero_grad()
                    assert self.gradient_norm is not None
                    self.latest_norms["gradient_norm" if index == 0 else f"{spec.name}_gradient_norm"] = (
                        self.gradient_norm
                    )
        if due:
            self.task.after_step()
            self.completed_steps += 1
            for average in self._averages():
                average.update()

    @contextmanager
    def _only_trainable(self, index: int) -> Iterator[None]:
        """Disable gradients, within the block, of the parameters of all optimizers but number ``index``."""
        others = [each for i, each in enumerate(self.trainer.optimizers) if i != index]
        parameters = [p for each in others for group in each.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _backward(self, loss: Tensor, sync: bool) -> None:
        """Run the backward pass; gradients are averaged over the ranks if ``sync``."""
        strategy = self.trainer.strategy
        unsynced = (
            strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) and not sync else nullcontext()
        )
        with torch.autocast(self.device.type, enabled=False), unsynced:  # torch recommends no autocast here
            self.manual_backward(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate and clip the gradients, which in fp16 are unscaled only now.

        No scheduler is used: a resumed one would keep the learning rate of the old config.
        """
        config = self.train_config
        set_learning_rate(optimizer, config.learning_rate * config.learning_rate_factor(self.completed_steps))
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        self.gradient_norm = clip_gradients(parameters, config.gradient_clip)

    def _over_ranks(self, loss: TrainLoss) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return the value of a loss and its metrics, averaged over the ranks, so that all ranks see if one is not finite."""
        if self.world_size == 1:
            return loss.value, loss.metrics
        values = [torch.as_tensor(value, device=self.device) for value in (loss.value, *loss.metrics.values())]
        value, *metrics = mean_over_ranks(torch.stack([each.detach().float() for each in values]))
        return value, dict(zip(loss.metrics, metrics, strict=True))

    def _finite(self, loss: Tensor, own: Tensor, batch: Mapping[str, Any]) -> float:
        """Return the value of the loss of a batch, of which ``own`` is the value on this rank.

        Raises:
            TrainingError: it is NaN or infinite, or the gradients of the step before were.
        """
        self._check_gradients()
        value = float(loss.detach())
        if not math.isfinite(value):
            problem = f"the loss of stage {self.stage} is {value} at step {self.completed_steps}"
            if not math.isfinite(float(own.detach())):  # else it is that of another rank
                keys = list(map(repr, batch["key"]))
                more = f" and {len(keys) - NAMED} others" if len(keys) > NAMED else ""
                problem = f"{problem} on the samples {', '.join(keys[:NAMED])}{more}"
            raise self._diverged(problem)
        return value

    def _check_gradients(self) -> None:
        """Check the gradients of the newest optimizer step; one step late, when the loss makes the CPU wait for the device."""
        norm, self.gradient_norm = self.gradient_norm, None
        scaled = self.trainer.precision == "16-mixed"  # the scaler skips steps whose gradients are not finite
        if norm is not None and not scaled and not math.isfinite(norm):
            raise self._diverged(
                f"the gradient norm of stage {self.stage} is {float(norm)} after step {self.completed_steps}"
            )

    def verify(self, batch: Mapping[str, Any] | None) -> None:
        """Check that training can go on from the present weights; called on all ranks before they are saved.

        Args:
            batch: the newest training batch, whose loss is computed again; None if there was none since the weights were loaded.

        Raises:
            TrainingError: the gradients, the weights, their average, or the loss are not finite.
        """
        if self.verified_steps == self.completed_steps:
            return
        self._check_gradients()
        broken = not_finite(self.task.state_dict()) or (self.ema and not_finite(self.ema.average))
        problem = f"the weight {broken} of stage {self.stage} holds NaN or infinite values" if broken else None
        if problem is None and batch is not None:
            step, autocast = self.batch_step("verify"), self.trainer.precision_plugin.train_step_context()
            value = infinite_loss(self.task, batch, step, autocast)
            problem = None if value is None else f"the weights of stage {self.stage} give a loss of {value}"
        if self.trainer.strategy.reduce_boolean_decision(problem is not None, all=False):
            problem = problem or f"the loss of stage {self.stage} on another device is not finite"
            raise self._diverged(f"{problem} after step {self.completed_steps}")
        self.verified_steps = self.completed_steps

    def _diverged(self, problem: str) -> DivergedError:
        """Return the error for weights, gradients or losses that are not finite, naming the checkpoints to resume from."""
        last, best = (self.folder / name for name in ("last.ckpt", "best.ckpt"))
        remedy = f"with a lower {self.stage}.train.learning_rate or in another trainer.precision"
        if not last.exists():
            return DivergedError(f"{problem}; there is no checkpoint yet. Start again {remedy}.")
        instead = f", or copy {best} to it if it ends like this again at once" if best.exists() else ""
        return DivergedError(f"{problem}; the last good checkpoint is {last}. Resume it {remedy}{instead}.")

    def try_settings(self) -> None:
        """Try what is computed during the training once; see :func:`ldm.training.trial.try_settings`."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        try_settings(
            self.task,
            data.samples,
            data.validates,
            self.train_config.batch_size,
            lambda name, number: replace(self.step(name, 0), number=number),
            self.trainer.precision_plugin.train_step_context,
        )

    # Averaged weights: training uses the current weights, everything else the averaged ones

    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        self.fingerprints = data.fingerprints()
        self.task.check_batch_size(self._samples_per_batch)
        if self.train_config.ema_decay and self.ema is None:
            self.ema = EMA(self.task.trainable_module, self.train_config.ema_decay)
        if not self.power_averages:
            self.power_averages = self._new_power_averages()
        for average in self._averages():
            average.to(self.device)

    def _averages(self) -> list[EMA]:
        return [*([] if self.ema is None else [self.ema]), *self.power_averages]

    def _new_power_averages(self) -> list[PowerEMA]:
        config = self.train_config.ema_snapshots
        return [PowerEMA(self.task.trainable_module, each) for each in config.lengths] if config else []

    def ema_weights(self) -> AbstractContextManager[None]:
        """Swap the averaged weights into the networks within the block."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def on_validation_epoch_start(self) -> None:
        self.results = []
        self.averaged = self.ema_weights()
        self.averaged.__enter__()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        loader: Any = self.trainer.val_dataloaders
        rows, size = loader.rows(batch_idx), loader.size(batch_idx)
        results = self.task.evaluate(batch, self.batch_step("validation", batch_idx, rows=rows, size=size))
        self.results.append({name: each if rows else each[:0] for name, each in results.items()})

    def on_validation_epoch_end(self) -> None:
        self.validation = self.task.metrics(
            {name: self._gathered([each[name] for each in self.results]) for name in self.results[0]}
        )
        self.end_averaging()

    def end_averaging(self) -> None:
        """Swap the current weights back into the networks, after a validation or when it is stopped."""
        self.averaged.__exit__(None, None, None)

    def _gathered(self, results: list[Tensor]) -> Tensor:
        """Return the results of all batches of all ranks, in the order of the samples."""
        if self.world_size == 1:
            return torch.cat(results)
        ranks: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(ranks, [rows.cpu() for rows in results])
        return torch.cat([rows for batch in zip(*ranks, strict=True) for rows in batch])

    @torch.no_grad()
    def previews(self, splits: Splits) -> Mapping[str, Preview]:
        """Return the images of the task, made with the averaged weights."""
        with self.ema_weights(), evaluation_mode(self.task):
            return self.task.previews(splits, self.step("pictures"))  # the key is part of the seed

    @torch.no_grad()
    def export(self, splits: Splits) -> tuple[Export, dict[str, Tensor], str | None]:
        """Export a finished stage, with averaged weights.

        Returns:
            The export; the state of its module, gathered on the first rank and empty on the others; and the name of a tensor
            that is not finite, None if there is none.
        """
        with self.ema_weights(), evaluation_mode(self.task):
            self.task.finish(splits)
            export = self.task.export()
            state = export.module.state_dict()
            return export, gathered(state, keep=self.global_rank == 0), not_finite(state)

    # Checkpoints

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        return image_towers.without(self.task, self.task.state_dict(*args, **options))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.task.load_state_dict(image_towers.added(self.task, state_dict), strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["completed_steps"] = self.completed_steps
        checkpoint["interrupted"] = self.interrupted
        checkpoint["handoff"] = self.handoff
        checkpoint[image_towers.RECORD] = self.tower_fingerprints
        checkpoint["settings"] = to_dict(self.settings)
        checkpoint["samples"] = self.fingerprints
        checkpoint["samples_per_batch"] = self._samples_per_batch
        checkpoint[RECORD] = self._record()
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()
        if self.power_averages:
            checkpoint["power_averages"] = {f"{each.length:g}": each.state_dict() for each in self.power_averages}

    def provenance(self) -> dict[str, Any]:
        """Return how the present weights were made, as JSON values."""
        own = {"stage": self.stage, "steps": self.completed_steps, "seed": self.seed}
        return own | {"ldm": __version__, "handoff": self.handoff}

    def _record(self) -> dict[str, str]:
        """Return the record by which a checkpoint can be read as a model; see :mod:`ldm.formats.training_checkpoint`."""
        export, last = self.task.export(), self.train_config.max_steps
        name = next(name for name, module in self.task.named_modules() if module is export.module)
        provenance = self.provenance() | {"max_steps": last, "unfinished": self.completed_steps < last}
        metadata = metadata_of(export.config, export.tokenizer, export.format)
        return metadata | {"provenance": json.dumps(provenance), "fingerprint": "", MODULE: name}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.completed_steps = checkpoint["completed_steps"]
        self.interrupted = checkpoint.get("interrupted", False)
        if "ema" in checkpoint:
            self.ema = EMA(self.task.trainable_module, self.train_config.ema_decay)
            self.ema.load_state_dict(checkpoint["ema"])
        if "power_averages" in checkpoint:
            self.power_averages = self._new_power_averages()
            for average in self.power_averages:
                average.load_state_dict(checkpoint["power_averages"][f"{average.length:g}"])
        for saved, optimizer in zip(checkpoint["optimizer_states"], self.configure_optimizers(), strict=True):
            for group, now in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                group |= {name: value for name, value in now.items() if name != "params"}
        now = self._samples_per_batch
        self._continue_batches(checkpoint["loops"]["fit_loop"], checkpoint.get("samples_per_batch", now), now)

    @property
    def _samples_per_batch(self) -> int:
        return self.train_config.batch_size * self.world_size

    def _continue_batches(self, fit_loop: dict[str, Any], before: int, now: int) -> None:
        """Count the batches of a saved loop as if all steps had accumulated as many as the config says.

        Lightning counts batches, the config steps. The position in the data stays that of the checkpoint.

        Args:
            fit_loop: state of Lightning's loop, changed in place.
            before, now: samples of a batch on all ranks, in the checkpoint and from now on.
        """
        batches = self.completed_steps * self.train_config.accumulate
        progress = fit_loop["epoch_loop.batch_progress"]
        # A finished run continues if max_steps was raised; Lightning would mistake the end of the run for the end of the data.
        progress["is_last_batch"] = self.completed_steps >= self.train_config.max_steps
        more = batches - progress["current"]["ready"]
        # All checkpoints are saved in on_train_batch_end, when all but the completion of the batch is counted.
        for counts in (progress["total"], progress["current"]):
            counts |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
        for loader in fit_loop["state_dict"]["combined_loader"]:
            position = loader.get("origin", 0) + loader["batch"] * before
            loader["batch"] += more
            loader["origin"] = position - loader["batch"] * now
