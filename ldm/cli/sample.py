"""Pictures from prompts: ``tools/sample.py`` and ``ldm-sample``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ldm.cli.common import DTYPES, Debug, new_app, run
from ldm.errors import SamplingError, unknown

if TYPE_CHECKING:
    from ldm.image_output import Images
    from ldm.pipeline import Pipeline

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
    prompts: Annotated[list[str] | None, Argument(help="What to show; several make several images.")] = None,
    model: Annotated[
        str, Option(help="Run, file, diffusers folder, hub id, or the name of the shipped model.")
    ] = "emoji",
    vae: Annotated[str | None, Option(help="Source of a VAE in place of the model's.")] = None,
    prediction_type: Annotated[str | None, Option(help="epsilon or v_prediction, where a file of SD lacks it.")] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a hub id.")] = None,
    lora: Annotated[
        list[str] | None, Option(help="A file of LoRA to add, or FILE:0.8 to scale it; repeatable.")
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="A file (several images: a grid), a pattern with {index} or {seed}, or a folder."),
    ] = None,
    animate: Annotated[Path | None, Option(help="A .gif to show the denoising in, beside --out.")] = None,
    seed: Annotated[int | None, Option(help="Of the first image; the next have the next. Random.")] = None,
    steps: Annotated[int | None, Option(help="Steps of the sampler. As the model says.")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale, 1 = none. As the model says.")] = None,
    guide: Annotated[
        list[str] | None,
        Option(help="More of guidance, repeatable: rescale=0.7, interval=[0.3,5], perturbed=3, projection.eta=0, ..."),
    ] = None,
    sampler: Annotated[str | None, Option(help="See --list-samplers. As the model says.")] = None,
    eta: Annotated[float | None, Option(help="Fresh noise in a step, 0 to 1. As the sampler says.")] = None,
    option: Annotated[list[str] | None, Option(help="More of the sampler, repeatable: order=3, rtol=0.01, ...")] = None,
    spacing: Annotated[str | None, Option(help="Of the noise levels: trailing, karras, ... As the model says.")] = None,
    shift: Annotated[float | None, Option(help="Factor on the noise levels of a flow model.")] = None,
    sigmas: Annotated[str | None, Option(help="Noise levels of your own: 14.6,5,2,0.5.")] = None,
    image: Annotated[
        list[Path] | None, Option(help="An image to begin with, repeatable; with --mask, to be painted anew in parts.")
    ] = None,
    mask: Annotated[list[Path] | None, Option(help="White where the image is to be painted anew.")] = None,
    strength: Annotated[float | None, Option(help="Share of the steps that change --image, 0 to 1.")] = None,
    negative: Annotated[str | None, Option(help="What to keep away from.")] = None,
    prompt_syntax: Annotated[
        str | None, Option(help="How prompts are read: weighted knows (word:1.3), [word] and [cat:dog:0.4]. plain.")
    ] = None,
    label: Annotated[list[int] | None, Option(help="A class, for models that read classes; repeatable.")] = None,
    n: Annotated[int, Option("--n", "-n", help="Pictures for each prompt.")] = 1,
    height: Annotated[int | None, Option(help="In pixels. As the model was trained.")] = None,
    width: Annotated[int | None, Option(help="In pixels. As the model was trained.")] = None,
    batch_size: Annotated[int | None, Option(help="Most images at once. All.")] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1, ... The GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16. bf16 where it is native.")] = None,
    demo: Annotated[bool, Option("--demo", help="Eight fixed prompts as a grid with captions.")] = False,
    list_samplers: Annotated[bool, Option("--list-samplers", help="Show the samplers and leave.")] = False,
    debug: Debug = False,
) -> None:
    """Make images from PROMPTS and print the files written."""
    if list_samplers:
        _print_samplers()
        return
    import torch

    from ldm.animation import Animation
    from ldm.config import from_dict
    from ldm.diffusion import Guidance
    from ldm.image_output import check_animation, check_target, write_picture
    from ldm.pipeline import Pipeline

    if dtype is not None and dtype not in DTYPES:
        raise SamplingError(unknown("dtype", dtype, DTYPES))
    if demo and prompts:
        raise SamplingError("--demo has prompts of its own; leave either it or yours out.")
    if not image and (mask or strength is not None):
        raise SamplingError("--mask and --strength are about an image to begin with; give --image too.")
    target = check_target(out or ("demo.png" if demo else "sample.png"))
    if animate:
        check_animation(animate)
    precision = getattr(torch, DTYPES[dtype]) if dtype else None
    pipe = Pipeline.from_pretrained(
        model, device, precision, vae=vae, prediction_type=prediction_type, revision=revision
    )
    for given in lora or []:
        pipe.load_lora(*_scaled(given))
    frames = Animation(pipe)
    settings: dict[str, Any] = {
        "negative_prompt": negative,
        "prompt_syntax": prompt_syntax,
        "label": label or None,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "sampler_options": _settings(option),
        "eta": eta,
        "spacing": spacing,
        "shift": shift,
        "sigmas": _numbers(sigmas),
        "seed": DEMO_SEED if demo and seed is None else seed,
        "num_images_per_prompt": n,
        "batch_size": batch_size,
        "callback": frames if animate else None,
    }
    if guide:
        settings["guidance"] = from_dict(Guidance, _settings(guide), "--guide")
    settings = {name: value for name, value in settings.items() if value is not None}
    asked = [prompt for group in DEMO_PROMPTS.values() for prompt in group] if demo else prompts or None
    images = _edited(pipe, asked, image, mask, strength, settings) if image else pipe(asked, **settings)
    if demo:
        files = [write_picture(images.grid(columns=4, captions=True, scale=2), target)]
    else:
        files = images.save(target)
        print(f"seed {images.seeds[0]}", file=sys.stderr)
    if animate:
        files.append(frames.save(animate, images))
    print(*files, sep="\n")


def _edited(
    pipe: Pipeline,
    prompts: list[str] | None,
    image: list[Path],
    mask: list[Path] | None,
    strength: float | None,
    settings: dict[str, Any],
) -> Images:
    from ldm import editing

    settings |= {} if strength is None else {"strength": strength}
    if mask:
        return editing.inpaint(pipe, prompts, image, mask, **settings)
    return editing.image_to_image(pipe, prompts, image, **settings)


def _settings(given: list[str] | None) -> dict[str, Any]:
    """``["order=3", "projection.eta=0"]`` to nested values, read as YAML."""
    from omegaconf import OmegaConf

    for item in given or []:
        if "=" not in item:
            raise SamplingError(f"{item!r} is no setting; write name=value, such as order=3.")
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given or []))
    return values


def _scaled(given: str) -> tuple[str, float]:
    """``"FILE:0.8"`` to file and scale; a scale of 1 where there is no number at the end."""
    file, _, scale = given.rpartition(":")
    try:
        return (file, float(scale)) if file else (given, 1.0)
    except ValueError:
        return given, 1.0


def _numbers(given: str | None) -> list[float] | None:
    try:
        return None if given is None else [float(item) for item in given.split(",")]
    except ValueError:
        raise SamplingError(f"--sigmas is {given!r}; write falling numbers with commas between them.") from None


def _print_samplers() -> None:
    from ldm.diffusion import SPECS

    print(f"{'name':<18} {'order':>5} {'evaluations a step':>18}  {'noise':<8}  options")
    for name, spec in sorted(SPECS.items()):
        print(f"{name:<18} {spec.order:>5} {spec.evaluations:>18}  {spec.noise:<8}  {', '.join(spec.options)}")


def main() -> None:
    """The command."""
    run(app)
