"""Pictures from prompts: ``tools/sample.py`` and ``ldm-sample``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ldm.cli.common import Debug, new_app, run
from ldm.errors import SamplingError, unknown

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

DEMO_PROMPTS = {
    "held out": [
        "man astronaut medium-light skin tone",
        "mermaid dark skin tone",
        "Santa Claus medium-dark skin tone",
        "woman cook light skin tone",
        "vulcan salute medium skin tone",
    ],
    "trained on": ["red apple", "unicorn", "sunrise"],
}
"""What ``--demo`` asks for: captions that the shipped model's training did not see, and some that it saw."""

DEMO_SEED = 0

app = new_app()


@app.command()
def sample(
    prompts: Annotated[list[str] | None, Argument(help="What to show; several make several pictures.")] = None,
    model: Annotated[str, Option(help="Run folder, file, or the name of the shipped model.")] = "emoji",
    out: Annotated[
        Path | None,
        Option(help="A file (several pictures: a grid), a pattern with {index} or {seed}, or a folder."),
    ] = None,
    seed: Annotated[int | None, Option(help="Of the first picture; the next have the next. Random.")] = None,
    steps: Annotated[int | None, Option(help="Steps of the sampler. As the model says.")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale, 1 = none. As the model says.")] = None,
    sampler: Annotated[str | None, Option(help="See --list-samplers. As the model says.")] = None,
    eta: Annotated[float | None, Option(help="Fresh noise in a step, 0 to 1. As the sampler says.")] = None,
    negative: Annotated[str | None, Option(help="What to keep away from.")] = None,
    label: Annotated[list[int] | None, Option(help="A class, for models that read classes; repeatable.")] = None,
    n: Annotated[int, Option("--n", "-n", help="Pictures for each prompt.")] = 1,
    height: Annotated[int | None, Option(help="In pixels. As the model was trained.")] = None,
    width: Annotated[int | None, Option(help="In pixels. As the model was trained.")] = None,
    batch_size: Annotated[int | None, Option(help="Most pictures at once. All.")] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1, ... The GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16. bf16 where it is native.")] = None,
    demo: Annotated[bool, Option("--demo", help="Eight fixed prompts as a grid with captions.")] = False,
    list_samplers: Annotated[bool, Option("--list-samplers", help="Show the samplers and leave.")] = False,
    debug: Debug = False,
) -> None:
    """Make pictures from PROMPTS and print the files written."""
    if list_samplers:
        _print_samplers()
        return
    import torch

    from ldm.images import check_target, write_picture
    from ldm.pipeline import Pipeline

    if dtype is not None and dtype not in DTYPES:
        raise SamplingError(unknown("dtype", dtype, DTYPES))
    if demo and prompts:
        raise SamplingError("--demo has prompts of its own; leave either it or yours out.")
    target = check_target(out or ("demo.png" if demo else "sample.png"))
    pipe = Pipeline.from_pretrained(model, device, getattr(torch, DTYPES[dtype]) if dtype else None)
    images = pipe(
        [prompt for group in DEMO_PROMPTS.values() for prompt in group] if demo else prompts or None,
        negative,
        label=label or None,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        seed=DEMO_SEED if demo and seed is None else seed,
        num_images_per_prompt=n,
        eta=eta,
        batch_size=batch_size,
    )
    if demo:
        files = [write_picture(images.grid(columns=4, captions=True, scale=2), target)]
    else:
        files = images.save(target)
        print(f"seed {images.seeds[0]}", file=sys.stderr)
    print(*files, sep="\n")


def _print_samplers() -> None:
    from ldm.diffusion import SPECS

    print(f"{'name':<16} {'order':>5} {'evaluations a step':>18}  stochastic")
    for name, spec in SPECS.items():
        print(f"{name:<16} {spec.order:>5} {spec.evaluations:>18}  {'yes' if spec.stochastic else 'no'}")


def main() -> None:
    """The command."""
    run(app)
