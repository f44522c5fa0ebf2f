"""The loop around a stage: Lightning's trainer, set up so that the same call goes on where the last one stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch

from ldm.config import config_field
from ldm.devices import default_device, default_dtype
from ldm.errors import CheckpointError, first_line
from ldm.formats.native import check_names
from ldm.training.callbacks import Checkpoints, Metrics, Pictures, Progress, StepCounter
from ldm.training.optim import Precision, TrainConfig
from ldm.training.stage import StageModule

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class TrainerConfig:
    """What the stages' trainings share: the machine."""

    accelerator: str = config_field("auto", "auto, cpu, gpu or another of Lightning's")
    devices: int | Literal["auto"] = config_field("auto", "number of devices")
    strategy: str = config_field("auto", "of Lightning: auto, ddp, ...")
    precision: Precision = config_field(
        "auto", "of the networks under autocast; auto = bf16 where the hardware has it natively, else fp32"
    )
    compile: bool = config_field(False, "torch.compile the networks; pays off in long trainings")
    threads: int | None = config_field(None, "CPU threads; null = one a core")

    def precision_of(self, train: TrainConfig) -> str:
        """fp32, bf16 or fp16 for a stage, with auto decided for the machine at hand."""
        wanted = train.precision or self.precision
        if wanted != "auto":
            return wanted
        device = torch.device("cpu") if self.accelerator == "cpu" else default_device()
        return "bf16" if default_dtype(device) == torch.bfloat16 else "fp32"


def completed_steps(module: StageModule) -> int:
    """Steps that the stage's ``last.ckpt`` has behind it; 0 if there is none.

    Raises:
        CheckpointError: it cannot be read, is of another model, trains other parts of it, or was trained on other
            predecessors than those at hand.
    """
    last = module.folder / "last.ckpt"
    if not last.is_file():
        return 0
    try:
        checkpoint = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f"{last} cannot be read ({reason}); delete it to begin the stage anew.") from None
    for name, mark in module.handoff.items():
        if checkpoint["handoff"].get(name) != mark:
            raise CheckpointError(
                f"{last} was trained on the {name} with fingerprint {checkpoint['handoff'].get(name)}, but the one at hand has "
                f"{mark}; delete {module.folder} to train the stage on it, or bring the old one back."
            )
    check_names(module, checkpoint["state_dict"], last)
    groups = [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    before, now = sum(len(group["params"]) for group in groups), sum(p.requires_grad for p in module.parameters())
    if before != now:
        raise CheckpointError(
            f"{last} trains {before} tensors of the networks, but the config asks to train {now}; undo the change "
            f"(conditioner.trainable?), or delete {module.folder} to begin the stage anew."
        )
    return int(checkpoint["completed_steps"])


def _strategy(config: TrainerConfig, module: StageModule) -> str:
    """The strategy asked for; between several devices, one that bears networks of which a step uses a part.

    With two optimizers, each step leaves the other's network without gradients.
    """
    several = (torch.cuda.device_count() if config.devices == "auto" else config.devices) > 1
    if several and not module.automatic_optimization and config.strategy in ("auto", "ddp"):
        return "ddp_find_unused_parameters_true"
    return config.strategy


def fit(module: StageModule, data: L.LightningDataModule, config: TrainerConfig) -> L.Trainer:
    """Train a stage to its last step, from ``last.ckpt`` if there is one.

    Args:
        module: with its start weights.
        data: whose training loader holds the batches of the whole run and can begin anywhere.
        config: the machine.

    Raises:
        TrainingError: it was stopped before its last step, or its loss is not finite.
    """
    train, start = module.train_config, completed_steps(module)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.compile:
        module.compile_networks()
    automatic = module.automatic_optimization
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=_strategy(config, module),
        precision=PRECISIONS[config.precision_of(train)],
        max_epochs=1,  # one epoch of the training stream is the whole run
        accumulate_grad_batches=train.accumulate if automatic else 1,
        gradient_clip_val=train.gradient_clip if automatic else None,
        val_check_interval=min(train.validate_every, train.max_steps) * train.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=module.folder,
        callbacks=[StepCounter(), Metrics(), Progress(), Pictures(), Checkpoints()],
    )
    trainer.fit(module, datamodule=data, ckpt_path=module.folder / "last.ckpt" if start else None, weights_only=True)
    return trainer
