"""Training: ``tools/train.py`` and ``ldm-train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.cli.cores import use_idle_cores
from ldm.errors import TrainingError, unknown

STAGES = ("vae", "clip", "denoiser", "decoder", "all")

app = new_app()


@app.command()
def train(
    config: Annotated[Path, Option(help="YAML file of the experiment.")],
    stage: Annotated[str, Option(help="Stage to train: vae, clip, denoiser, decoder, or all for each in turn.")],
    overrides: Annotated[
        list[str] | None, Argument(help="Overrides of the config as key=value, such as denoiser.train.max_steps=2000.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Summary of what would be trained and what it costs, without training.")
    ] = False,
    device: Annotated[
        str | None,
        Option(help="With --dry-run: device to compute the time for, such as h100; default: this machine's."),
    ] = None,
    devices: Annotated[int | None, Option(help="With --dry-run: number of devices; default: trainer.devices.")] = None,
    mfu: Annotated[float, Option(help="With --dry-run: share of the device's peak that is reached.")] = 0.4,
    price: Annotated[float | None, Option(help="With --dry-run: price of a device for an hour.")] = None,
    debug: Debug = False,
) -> None:
    """Train a stage; repeating the command resumes it."""
    if stage not in STAGES:
        raise TrainingError(unknown("stage", stage, STAGES))
    from ldm.training.experiment import load_config

    experiment = load_config(config, overrides or [])
    if stage not in ("all", *experiment.stages):
        raise TrainingError(f"{config} does not train stage {stage}; choose one of {', '.join(experiment.stages)}.")
    stages = experiment.stages if stage == "all" else (stage,)
    if dry_run:
        from ldm.cli.dry_run import Machine, describe

        print(describe(experiment, stages, Machine(device, devices, mfu, price)))
        return
    from ldm.training.fit import is_first_process
    from ldm.training.stages import train_stage

    keep_freed_memory()
    use_idle_cores()
    for each in stages:
        result = train_stage(experiment, each)
        if is_first_process():
            print(f"stage {each} is finished: {result}")


def main() -> None:
    """Run the command."""
    run(app)
