"""Comparison of recipes: ``tools/ablate.py`` and ``ldm-ablate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.errors import ConfigError

app = new_app()


@app.command()
def ablate(
    config: Annotated[Path, Option(help="YAML file of the experiment.")],
    recipes: Annotated[Path, Option(help="YAML file of the recipes, such as configs/recipes/denoiser.yaml.")],
    overrides: Annotated[
        list[str] | None, Argument(help="Overrides of the config of all runs as key=value, such as run_dir=runs/mine.")
    ] = None,
    minutes: Annotated[
        float | None, Option(help="Time of each training, by the time of a step, which is measured once.")
    ] = None,
    steps: Annotated[
        int | None, Option(min=1, help="Instead of --minutes: steps of plain, whose time is that of each training.")
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Number of seeds of each recipe.")] = 3,
    jobs: Annotated[int, Option(min=1, help="Number of trainings at once, each with its part of the cores.")] = 1,
    by: Annotated[
        str | None,
        Option(help="Number that decides; default: recall_by_image@1, probe_fid or text_to_image_R@1, by stage."),
    ] = None,
    only: Annotated[
        list[str] | None, Option(help="Recipe to compare with plain, repeatable or separated by commas; default: all.")
    ] = None,
    repeats: Annotated[
        int | None,
        Option(min=1, help="Seeds with which images are generated, or the probe is trained; default: 4, or 1 for vae."),
    ] = None,
    features: Annotated[
        list[str] | None,
        Option(
            help="Feature network of docs/evaluation.md, repeatable: clip=SOURCE, ...; default: the CLIP of stage 2."
        ),
    ] = None,
    times: Annotated[
        Path | None,
        Option(help="measured.json of a comparison on another machine: each training takes equal time there."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare recipes with the plain one at equal time over several seeds; repeating the command goes on."""
    if (minutes is None) == (steps is None):
        raise ConfigError("give either --minutes, the time of each training, or --steps, the steps of plain.")
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes is {minutes:g}; give a time above 0.")
    from tqdm import tqdm

    from ldm.ablation.runner import run_comparison

    keep_freed_memory()
    names = [name.strip() for each in only or () for name in each.split(",") if name.strip()]
    found = run_comparison(
        config,
        recipes,
        overrides or [],
        minutes=minutes,
        seeds=seeds,
        command=lambda folder: [sys.executable, "-m", "ldm.cli.ablation_run", str(folder)],
        plain_steps=steps,
        jobs=jobs,
        by=by,
        only=names,
        repeats=repeats,
        features=features or (),
        measured=times,
        say=tqdm.write,
    )
    folder = found.folders[0].parent
    print(
        f"\nMarkdown: {folder / 'ablation.md'}\ncharts: {folder / 'ablation.html'}\nnumbers: {folder / 'ablation.json'}"
    )


def main() -> None:
    """Run the command."""
    run(app)
