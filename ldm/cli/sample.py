"""The command that generates images from prompts: ``tools/sample.py`` and ``ldm-sample``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from ldm.cli.common import DTYPES, Backend, BackendOption, Debug, backend_of, new_app, options_from, run, values_of
from ldm.cli.cores import use_idle_cores
from ldm.errors import SamplingError, unknown
from ldm.image_marks import ImageMarks
from ldm.load_options import LoadOptions
from ldm.sampling_settings import SamplingSettings

if TYPE_CHECKING:
    from ldm.cli.recipe import Recipe
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
"""Prompts of ``--demo``: captions that the shipped model was not trained on, and some that it was."""

DEMO_SEED = 0

app = new_app()


@app.command()
@options_from(LoadOptions, into="load")
@options_from(SamplingSettings, into="settings")
@options_from(ImageMarks, into="marks")
def sample(
    context: Context,
    prompts: Annotated[list[str] | None, Argument(help="One or several prompts; each gives an image.")] = None,
    model: Annotated[
        str, Option(help="Run, file, diffusers folder, hub id, or the name of the shipped model.")
    ] = "emoji",
    lora: Annotated[list[str] | None, Option(help="LoRA file to load, or FILE:0.8 to scale it; repeatable.")] = None,
    textual_inversion: Annotated[
        list[str] | None, Option(help="Textual inversion to load, or TOKEN=FILE for another token; repeatable.")
    ] = None,
    controlnet: Annotated[
        list[str] | None, Option(help="ControlNet to load, or NAME=SOURCE; repeatable, each with its --control.")
    ] = None,
    control: Annotated[list[Path] | None, Option(help="Hint image of the --controlnet, repeatable.")] = None,
    control_scale: Annotated[
        list[float] | None, Option(help="Scale of the --controlnet, one for all or one for each; default: 1.")
    ] = None,
    control_span: Annotated[
        list[str] | None,
        Option(help="START,END: shares of the steps between which the --controlnet acts, likewise; default: 0,1."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="File (several images: a grid), pattern with {index} or {seed}, or folder."),
    ] = None,
    animate: Annotated[Path | None, Option(help="GIF of the denoising to write as well.")] = None,
    guide: Annotated[
        list[str] | None,
        Option(
            help="Further settings of guidance, repeatable: rescale=0.7, interval=[0.3,5], perturbed=3, "
            "projection.eta=0, ..."
        ),
    ] = None,
    option: Annotated[
        list[str] | None, Option(help="Further parameters of the solver, repeatable: order=3, rtol=0.01, ...")
    ] = None,
    image: Annotated[
        list[Path] | None, Option(help="Image to edit, repeatable; with --mask, to repaint in parts.")
    ] = None,
    mask: Annotated[list[Path] | None, Option(help="Mask, white where the image is repainted.")] = None,
    strength: Annotated[float | None, Option(help="Share of the steps that change --image, 0 to 1.")] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, Option(help="fp32, bf16 or fp16; default: bf16 if the device has it natively.")
    ] = None,
    compile_with: Backend = None,
    compile_option: BackendOption = None,
    demo: Annotated[bool, Option("--demo", help="Eight fixed prompts as a grid with captions.")] = False,
    read: Annotated[
        Path | None, Option(help="Print the command that makes this image again, and the fingerprint of its model.")
    ] = None,
    again: Annotated[
        bool, Option("--again", help="Make the image of --read again; options that are given replace its own.")
    ] = False,
    list_samplers: Annotated[bool, Option("--list-samplers", help="List the solvers and exit.")] = False,
    debug: Debug = False,
    *,
    settings: dict[str, Any],
    load: dict[str, Any],
    marks: dict[str, Any],
) -> None:
    """Generate images from PROMPTS and print the names of the files written."""
    if list_samplers:
        _print_samplers()
        return
    if again and read is None:
        raise SamplingError("--again makes the image of --read again; give --read with the file of an image.")
    recipe: Recipe | None = context.obj
    if read is not None and recipe is None:
        from ldm.cli.recipe import Recipe

        recipe = Recipe.of(read)
        if again:
            _make_again(context, recipe)
        else:
            _print_command(recipe, model)
        return
    import torch

    from ldm.animation import Animation
    from ldm.config import from_dict
    from ldm.diffusion import Guidance
    from ldm.image_output import check_animation, check_target, write_image
    from ldm.pipeline import Pipeline

    if dtype is not None and dtype not in DTYPES:
        raise SamplingError(unknown("dtype", dtype, DTYPES))
    if demo and prompts:
        raise SamplingError("--demo has prompts of its own; leave either it or yours out.")
    compiled = backend_of(compile_with, compile_option)
    if not image and (mask or strength is not None):
        raise SamplingError("--mask and --strength are about an image to begin with; give --image too.")
    if not controlnet and (control or control_scale or control_span):
        raise SamplingError(
            "--control, --control-scale and --control-span are about a ControlNet; give --controlnet too."
        )
    target = check_target(out or ("demo.png" if demo else "sample.png"))
    if animate:
        check_animation(animate)
    image_marks = ImageMarks(**marks)
    image_marks.check()
    use_idle_cores()
    precision = getattr(torch, DTYPES[dtype]) if dtype else None
    pipe = Pipeline.from_pretrained(model, device, precision, **load)
    if recipe is not None:
        recipe.check_model(pipe.model.fingerprint, model)
    for given in lora or []:
        pipe.load_lora(*_scaled(given))
    for given in textual_inversion or []:
        *token, file = [given] if Path(given).exists() else given.split("=", 1)
        pipe.load_textual_inversion(file, *token[:1])
    if controlnet:
        settings["controlnets"] = _controls(pipe, controlnet, control or [], control_scale or [], control_span or [])
    if compiled:
        pipe.compile(**compiled)
    frames = Animation(pipe)
    settings |= {"sampler_options": values_of(option), "callback": frames if animate else None}
    if guide:
        settings["guidance"] = from_dict(Guidance, values_of(guide), "--guide")
    if demo:
        prompts = [prompt for group in DEMO_PROMPTS.values() for prompt in group]
        settings = {"seed": DEMO_SEED} | settings
    images = _edited(pipe, prompts, image, mask, strength, settings) if image else pipe(prompts or None, **settings)
    if demo:
        files = [write_image(images.grid(columns=4, captions=True, scale=2), target, image_marks)]
    else:
        files = images.save(target, image_marks)
        print(f"seed {images.seeds[0]}", file=sys.stderr)
    if recipe is not None:
        print(recipe.compared(files[0]), file=sys.stderr)
    if animate:
        files.append(frames.save(animate, images))
    print(*files, sep="\n")


def _print_command(recipe: Recipe, model: str) -> None:
    """Print the command that makes an image again, after comments on what it needs, so that all of it can be pasted."""
    from ldm.formats import SHIPPED
    from ldm.formats import read as read_source

    options = [] if model == SHIPPED else ["--model", model]
    if recipe.model is not None:
        found = read_source(model).fingerprint == recipe.model
        print(f"# fingerprint of the model: {recipe.model}" + ("" if found else f"; {model} is another one"))
        options = options if found else ["--model", "MODEL"]
    for flag, meaning in recipe.needed:
        print(f"# {flag}: {meaning}")
        options += [flag, flag.removeprefix("--").upper()]
    program = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name]
    print(shlex.join([*program, *options, *recipe.arguments]))


def _make_again(context: Context, recipe: Recipe) -> None:
    """Run the command with the arguments of a recipe, and in addition or in place of them those that are given."""
    command = context.command
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    for flag, meaning in recipe.needed:
        if flag.removeprefix("--").replace("-", "_") not in given:
            raise SamplingError(f"{recipe.file} was made with {flag} ({meaning}); give it in addition to --again.")
    values = command.make_context(context.info_name, list(recipe.arguments)).params
    context.obj = recipe
    assert command.callback is not None
    context.invoke(command.callback, **{**values, **given})


def _edited(
    pipe: Pipeline,
    prompts: list[str] | None,
    image: list[Path],
    mask: list[Path] | None,
    strength: float | None,
    settings: dict[str, Any],
) -> Images:
    from ldm import editing

    prompts = prompts or None
    settings |= {} if strength is None else {"strength": strength}
    if mask:
        return editing.inpaint(pipe, prompts, image, mask, **settings)
    return editing.image_to_image(pipe, prompts, image, **settings)


def _controls(
    pipe: Pipeline, sources: list[str], images: list[Path], scales: list[float], spans: list[str]
) -> list[Any]:
    """Load ControlNets, and return the controls of the call."""
    from ldm.control_images import ControlImage

    n = len(sources)
    if len(images) != n:
        raise SamplingError(f"{n} --controlnet and {len(images)} --control are given; give one --control for each.")
    for flag, number in (("--control-scale", len(scales)), ("--control-span", len(spans))):
        if number not in (0, 1, n):
            raise SamplingError(f"{number} {flag} do not fit {n} --controlnet; give one for all, or one for each.")
    factors, limits = scales or [1.0], [_span(span) for span in spans or ["0,1"]]
    controls = []
    for i, source in enumerate(sources):
        *name, place = [source] if Path(source).exists() else source.split("=", 1)
        loaded = pipe.load_controlnet(place, *name)
        controls.append(ControlImage(loaded, images[i], factors[i % len(factors)], *limits[i % len(limits)]))
    return controls


def _span(given: str) -> tuple[float, float]:
    try:
        start, end = map(float, given.split(","))
    except ValueError:
        raise SamplingError(f"--control-span is {given!r}; write two shares of the steps, such as 0,0.5.") from None
    return start, end


def _scaled(given: str) -> tuple[str, float]:
    """Split ``"FILE:0.8"`` into file and scale; the scale is 1 if there is no number at the end."""
    file, _, scale = given.rpartition(":")
    try:
        return (file, float(scale)) if file else (given, 1.0)
    except ValueError:
        return given, 1.0


def _print_samplers() -> None:
    from ldm.diffusion import SPECS

    print(f"{'name':<18} {'order':>5} {'evaluations a step':>18}  {'noise':<8}  options")
    for name, spec in sorted(SPECS.items()):
        print(f"{name:<18} {spec.order:>5} {spec.evaluations:>18}  {spec.noise:<8}  {', '.join(spec.options)}")


def main() -> None:
    """The command."""
    run(app)
