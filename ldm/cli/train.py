"""Training: ``tools/train.py`` and ``ldm-train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.errors import TrainingError, unknown

STAGES = ("vae", "clip", "denoiser", "all")

app = new_app()


@app.command()
def train(
    config: Annotated[Path, Option(help="YAML of the experiment.")],
    stage: Annotated[str, Option(help="vae, clip, denoiser, or all three in turn.")],
    overrides: Annotated[list[str] | None, Argument(help="key=value, such as denoiser.train.max_steps=2000.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be trained and leave.")] = False,
    debug: Debug = False,
) -> None:
    """Train a stage; the same command again goes on where it stopped."""
    if stage not in STAGES:
        raise TrainingError(unknown("stage", stage, STAGES))
    from ldm.training.experiment import load_config

    experiment = load_config(config, overrides or [])
    if stage not in ("all", *experiment.stages):
        raise TrainingError(f"{config} trains no stage {stage}; it trains {', '.join(experiment.stages)}.")
    stages = experiment.stages if stage == "all" else (stage,)
    if dry_run:
        from ldm.cli.dry_run import describe

        print(describe(experiment, stages))
        return
    from ldm.training.stages import train_stage

    keep_freed_memory()
    for each in stages:
        print(f"stage {each} is finished: {train_stage(experiment, each)}")


def main() -> None:
    """The command."""
    run(app)
