"""Evaluation of a run, finished or not, or of one model: ``tools/evaluate.py`` and ``ldm-evaluate``.

The only reader of the test split.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Context, Exit, Option

from ldm.cli.common import Backend, BackendOption, Debug, backend_of, keep_freed_memory, new_app, run
from ldm.cli.cores import use_idle_cores
from ldm.errors import ConfigError

DEFAULT = "run"
"""Command that is meant if none is named."""

say = functools.partial(print, file=sys.stderr)


class DefaultGroup(typer.core.TyperGroup):
    """Group of commands of which :data:`DEFAULT` is called if none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = new_app(DefaultGroup)

Config = Annotated[Path | None, Option(help="YAML of the experiment.")]
Split = Annotated[str, Option(help="val, or in the end test.")]
Overrides = Annotated[
    list[str] | None, Argument(help="A run folder or that of a stage in it, and key=value, such as run_dir=runs/mine.")
]
Model = Annotated[
    str | None,
    Option(help="A model, VAE or CLIP to evaluate instead of the run's: a file, emoji, or any other source."),
]
CheckpointName = Annotated[
    str | None, Option(help="best, last or a step: evaluate these checkpoints of the stages, finished or not.")
]
Metrics = Annotated[
    list[str] | None,
    Option(
        "--metrics",
        help="Measure only these, repeatable or separated by commas: names of docs/evaluation.md, vae, all, ...",
    ),
]
FeatureNetworks = Annotated[
    list[str] | None,
    Option(
        "--features",
        help="Feature network of docs/evaluation.md, repeatable: own, own=FILE, clip=SOURCE, ...; default: own.",
    ),
]
Images = Annotated[int | None, Option(min=2, help="Measure only the first images of the split; default: all.")]
Reference = Annotated[
    str | None, Option(help="Split whose images generated ones are compared with; default: the evaluated one.")
]
BatchSize = Annotated[
    int | None, Option(min=1, help="Number of images that are computed at once; default: 32. Fewer need less memory.")
]
Seed = Annotated[int, Option(help="Seed of the first generated image, and of noise and training in other metrics.")]


@app.callback()
def group() -> None:
    """Evaluate a run or a model; the command is run, with its options, if none is named."""


@app.command(DEFAULT)
def evaluate(
    context: Context,
    config: Config = None,
    split: Split = "val",
    overrides: Overrides = None,
    model: Model = None,
    checkpoint: CheckpointName = None,
    ema_length: Annotated[
        float | None, Option(help="Length of the average of the weights, of a run with train.ema_snapshots.")
    ] = None,
    train_every: Annotated[
        int | None, Option(min=1, help="Also generate images for every n-th training caption; default: for about 125.")
    ] = None,
    steps: Annotated[int | None, Option(help="Steps of the sampler; default: that of the model.")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale; default: that of the model.")] = None,
    sampler: Annotated[str | None, Option(help="Name of the sampler; default: that of the model.")] = None,
    setting: Annotated[
        list[str] | None,
        Option(
            help="Further sampling settings, repeatable, such as cache_interval=3; the images are also compared with those "
            "without them."
        ),
    ] = None,
    metrics: Metrics = None,
    features: FeatureNetworks = None,
    images: Images = None,
    reference: Reference = None,
    seed: Seed = 0,
    template: Annotated[
        list[str] | None, Option(help="Template of zero-shot classification with {}, repeatable.")
    ] = None,
    classes: Annotated[
        Path | None, Option(help="Text file with the names of the classes, one a line, by label; default: captions.")
    ] = None,
    probe_steps: Annotated[int, Option(min=1, help="Training steps of the metric probe.")] = 300,
    batch_size: BatchSize = None,
    receipts: Annotated[
        Path | None,
        Option(help="File to write; default: receipts-<split>.json of the run, with the names of what else is given."),
    ] = None,
    verify: Annotated[
        Path | None, Option(help="Compute the numbers of this file of receipts again; exit code 1 if one is outside.")
    ] = None,
    compile_with: Backend = None,
    compile_option: BackendOption = None,
    debug: Debug = False,
) -> None:
    """Measure the stages of a run or one model as far as they are trained, and write a receipt for each number.

    Without --metrics also the summary: reconstruction, retrieval, and how well generated images match their captions.
    """
    from ldm.config import with_overrides
    from ldm.evaluation import runner, table
    from ldm.evaluation.opening import Request, open_subject
    from ldm.evaluation.subject import BATCH, Options
    from ldm.evaluation.summary import sheet, summary

    keep_freed_memory()
    use_idle_cores()
    if verify is not None:
        others = [name for name in context.params if name not in ("verify", "debug") and _is_given(context, name)]
        if others:
            raise ConfigError(
                f"--verify computes with the arguments in the receipts, without effect of {', '.join(others)}; leave them out."
            )
        _verify(verify)
        return
    path, stage, changes = _config_of(config, overrides or [])
    request = Request(
        config=str(path),
        overrides=changes,
        stage=stage,
        model=model,
        checkpoint=checkpoint,
        ema_length=ema_length,
        split=split,
        train_every=train_every,
        settings={"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler},
        further=with_overrides({}, setting or [], "--setting"),
        compiled=backend_of(compile_with, compile_option) or {},
        features=features or (),
        metrics=_names(metrics),
        options=Options(
            images=images,
            reference=reference,
            seed=seed,
            templates=tuple(template or ("{}",)),
            classes=_lines("--classes", classes),
            probe_steps=probe_steps,
            batch_size=batch_size or BATCH,
        ),
    )
    subject = open_subject(request, say)
    result = runner.evaluate(request, subject, _progress)
    part = [split] if stage is None else [split, stage]  # numbers of a part of a run do not replace those of all of it
    if result.numbers:
        name = "-".join(["receipts", *part, *_names(metrics)])
        file = receipts or subject.folder / f"{name}{request.suffix}.json"
        result.write(file)
        print(f"{table.of_one(result)}\nreceipts: {file}")
    elif metrics:
        raise ConfigError(
            f"none of the metrics {', '.join(_names(metrics))} applies to {result.name}; choose others, or give --features."
        )
    results = {} if metrics else summary(subject, result.numbers)
    if "samples" in results:
        place = subject.folder / f"evaluation-{split}{request.suffix}.png"
        sheet(subject).save(place)
        print(f"generated images above the true images: {place}")
    if results:
        print(json.dumps(results, indent=2))
        name = "-".join(["evaluation", *part])
        (subject.folder / f"{name}{request.suffix}.json").write_text(json.dumps(results, indent=2) + "\n")


@app.command()
def compare(
    runs: Annotated[list[Path], Argument(help="Run folders, or files of receipts.")],
    across: Annotated[
        list[str] | None,
        Option(help="Field of the receipts that may differ, repeatable, such as steps or guidance_scale."),
    ] = None,
    split: Annotated[
        str | None, Option(help="Receipts of run folders: val or test; default: test if all have them, else val.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show the numbers of runs in one table, and rank those whose receipts agree in everything but the weights."""
    from ldm.evaluation import table
    from ldm.evaluation.receipt import read_receipts, split_of_all

    split = split or split_of_all(runs)
    print(table.of_several([read_receipts(path, split) for path in runs], across or []))


@app.command()
def sweep(
    config: Config = None,
    split: Split = "val",
    overrides: Overrides = None,
    model: Model = None,
    checkpoint: CheckpointName = None,
    guidance: Annotated[str | None, Option(help="Guidance scales, separated by commas: 1,2,3,5.")] = None,
    steps: Annotated[str | None, Option(help="Numbers of steps, separated by commas: 10,25,50.")] = None,
    sampler: Annotated[str | None, Option(help="Samplers, separated by commas: dpmpp_2m,euler.")] = None,
    ema_length: Annotated[
        str | None,
        Option(help="Lengths of the average, separated by commas, of a run with train.ema_snapshots: 0.05,0.1."),
    ] = None,
    setting: Annotated[list[str] | None, Option(help="Further sampling settings of all, such as shift=2.")] = None,
    x: Annotated[
        str, Option(help="Number on the horizontal axis, such as clip_score, or evaluations, the cost.")
    ] = "evaluations",
    y: Annotated[str, Option(help="Number on the vertical axis, such as fid.")] = "recall_by_image@1",
    features: FeatureNetworks = None,
    images: Images = None,
    reference: Reference = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    out: Annotated[
        Path, Option(help="Folder of sweep.json, sweep.txt, sweep.png, and the receipts of each combination.")
    ] = Path("sweep"),
    debug: Debug = False,
) -> None:
    """Measure a model with each combination of sampling settings, and show which are on the Pareto front.

    Repeating the command goes on where it was stopped.
    """
    from ldm.config import with_overrides
    from ldm.evaluation.opening import Request, open_subject, with_average
    from ldm.evaluation.subject import BATCH, Options
    from ldm.evaluation.sweep import SweepFolder, require_matplotlib
    from ldm.evaluation.sweep import sweep as measure

    require_matplotlib()
    keep_freed_memory()
    use_idle_cores()
    values = {
        "ema_length": _listed("--ema-length", ema_length, float),
        "guidance_scale": _listed("--guidance", guidance, float),
        "num_inference_steps": _listed("--steps", steps, int),
        "sampler": _listed("--sampler", sampler, str),
    }
    values = {name: each for name, each in values.items() if each}
    if not values:
        raise ConfigError(
            "there is nothing to sweep over; give values for --guidance, --steps, --sampler or --ema-length."
        )
    path, stage, changes = _config_of(config, overrides or [])
    request = Request(
        config=str(path),
        overrides=changes,
        stage=stage,
        model=model,
        checkpoint=checkpoint,
        split=split,
        further=with_overrides({}, setting or [], "--setting"),
        features=features or (),
        options=Options(images=images, reference=reference, seed=seed, batch_size=batch_size or BATCH),
    )
    subject = open_subject(request, say)
    average = functools.partial(with_average, request, subject)
    folder = SweepFolder(out, request, subject, (x, y))
    result = measure(subject, values, (x, y), say, average, folder)
    result.plot(out / "sweep.png")
    print(f"{result.table}\n* = on the Pareto front; plot and receipts: {out}")


def _listed(option: str, given: str | None, kind: Callable[[str], Any]) -> list[Any]:
    """Return the values of an option that are separated by commas."""
    try:
        return [kind(each.strip()) for each in (given or "").split(",") if each.strip()]
    except ValueError:
        raise ConfigError(f"{option} is {given!r}; write values separated by commas.") from None


def _lines(option: str, path: Path | None) -> tuple[str, ...]:
    """Return the lines of the text file of an option; none without a file."""
    try:
        return () if path is None else tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read ({error}); give a text file with one name a line.") from None


def _is_given(context: Context, name: str) -> bool:
    """Return whether an argument was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _verify(path: Path) -> None:
    from ldm.evaluation import runner
    from ldm.evaluation.receipt import read_receipts

    found = runner.verify(read_receipts(path), _progress)
    for each in found:
        network = f" ({each.recorded.conditions.network})" if each.recorded.conditions.network else ""
        print(f"{each.recorded.conditions.metric}{network}: {each.sentence}")
    inside = sum(each.inside for each in found)
    print(f"{inside} of {len(found)} numbers are inside of their intervals")
    if inside < len(found):
        raise Exit(1)


def _config_of(config: Path | None, given: list[str]) -> tuple[Path, str | None, list[str]]:
    """Return the YAML, the one stage to evaluate, and the overrides; a folder that is given stands for its run.

    Raises:
        ConfigError: neither a YAML nor a run folder is given, or both.
    """
    from ldm.training.tasks import TASKS

    folders = [Path(each) for each in given if "=" not in each and Path(each).is_dir()]
    rest = [each for each in given if "=" in each or not Path(each).is_dir()]
    if len(folders) + (config is not None) != 1:
        raise ConfigError("give either --config with the YAML of an experiment, or one run folder, such as runs/mine.")
    if config is not None:
        return config, None, rest
    folder, stage = folders[0], None
    if folder.name in TASKS and (folder.parent / "config.yaml").is_file():
        folder, stage = folder.parent, folder.name
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run folder, since it holds no config.yaml; give --config instead.")
    return folder / "config.yaml", stage, [f"run_dir={folder}", *rest]


def _names(given: list[str] | None) -> list[str]:
    """Return the names of options that are repeated or separated by commas."""
    return [name.strip() for each in given or () for name in each.split(",") if name.strip()]


def _progress(name: str) -> None:
    if sys.stderr.isatty():
        say(f"measuring {name}")


def main() -> None:
    """Run the command."""
    run(app)
