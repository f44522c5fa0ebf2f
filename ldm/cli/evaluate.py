"""Evaluation of a run, finished or not, or of one model: ``tools/evaluate.py`` and ``ldm-evaluate``.

The only reader of the test split.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ldm.cli.common import Backend, BackendOption, Debug, backend_of, keep_freed_memory, new_app, run
from ldm.cli.cores import use_idle_cores
from ldm.errors import CheckpointError, DataError, unknown, warn

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from ldm.clip.model import CLIP
    from ldm.clip.tokenizer import Tokenizer
    from ldm.data.samples import Batch, Samples
    from ldm.formats.checkpoint import Checkpoint
    from ldm.load_options import Source
    from ldm.pipeline import Pipeline
    from ldm.training.experiment import Experiment
    from ldm.vae import FirstStage

BATCH = 32
SHOWN, COLUMNS = 24, 8
"""Number of generated images on the sheet, and in a row of it."""

HELD_OUT = ("val", "test")

app = new_app()


@app.command()
def evaluate(
    config: Annotated[Path, Option(help="YAML of the experiment.")],
    split: Annotated[str, Option(help="val, or in the end test.")] = "val",
    overrides: Annotated[list[str] | None, Argument(help="key=value, such as run_dir=runs/mine.")] = None,
    model: Annotated[
        str | None,
        Option(help="A model, VAE or CLIP to evaluate instead of the run's: a file, emoji, or any other source."),
    ] = None,
    checkpoint: Annotated[
        str | None, Option(help="best, last or a step: evaluate these checkpoints of the stages, finished or not.")
    ] = None,
    train_every: Annotated[int, Option(help="Also generate images for every n-th training caption.")] = 28,
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
    compile_with: Backend = None,
    compile_option: BackendOption = None,
    debug: Debug = False,
) -> None:
    """Measure reconstruction, retrieval, and how well generated images match their captions, as far as stages are trained."""
    from ldm.config import with_overrides
    from ldm.formats import read
    from ldm.formats.training_checkpoint import training_note
    from ldm.training.experiment import load_config

    if split not in HELD_OUT:
        raise DataError(unknown("split", split, HELD_OUT))
    keep_freed_memory()
    use_idle_cores()
    experiment = load_config(config, overrides or [])
    data = experiment.data.without_cache()  # images are read one after the other
    sources: list[Source] = list(sources_of(experiment, checkpoint).values()) if model is None else [model]
    found = [read(source, checkpoint=checkpoint if source is model else None) for source in sources]
    run = Run(
        folder=experiment.folder if model is None else Path(),
        **networks(found),
        sets={  # samples are compared with the images of all splits that there are
            name: data.open(name) for name in ("train", *HELD_OUT) if name == split or data.has(name)
        },
        split=split,
        train_every=train_every,
        settings={"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler},
        further=with_overrides({}, setting or [], "--setting"),
        compiled=backend_of(compile_with, compile_option),
    )
    if run.compiled and run.pipe:
        run.pipe.compile(**run.compiled)
    results: dict[str, Any] = {"model": run.pipe.model.fingerprint if run.pipe else None, "split": split}
    notes = [note for each in found if (note := training_note(each.provenance))]
    results |= {"checkpoints": notes} if notes else {}
    for measure in MEASUREMENTS:
        results |= measure(run)
    print(json.dumps(results, indent=2))
    (run.folder / f"evaluation-{split}.json").write_text(json.dumps(results, indent=2) + "\n")


def sources_of(experiment: Experiment, checkpoint: str | None) -> dict[str, Source]:
    """Return what each stage of an experiment has to evaluate, by stage: a checkpoint of that name, or its result.

    Raises:
        CheckpointError: there is none.
    """
    from ldm.formats.training_checkpoint import checkpoint_in
    from ldm.training.handoff import result_file
    from ldm.training.tasks import TASKS

    sources: dict[str, Source] = {}
    named = False  # whether a stage has a checkpoint of that name
    for stage in (stage for stage in TASKS if getattr(experiment, stage) is not None):
        result = result_file(experiment, stage)
        found = None if checkpoint is None else checkpoint_in(experiment.folder / stage, checkpoint)
        named |= found is not None
        given = getattr(getattr(experiment, stage), "checkpoint", None)
        source = given or found or (result if result.is_file() else None)
        if source is not None:
            sources[stage] = source
        elif stage in experiment.stages:
            wanted = "" if checkpoint is None else f"checkpoint {checkpoint!r} of it and no "
            print(f"stage {stage} is left out: there is no {wanted}{result}", file=sys.stderr)
    if not any(stage in sources for stage in experiment.stages):
        raise CheckpointError(
            f"{experiment.folder} holds no result of a stage; train one, or give --checkpoint best or last."
        )
    if checkpoint is not None and not named:
        raise CheckpointError(
            f"no stage of {experiment.folder} has a checkpoint {checkpoint!r}; give best, last or a step."
        )
    return sources


def networks(found: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return the fields of :class:`Run` that are networks, from the checkpoints that have them."""
    import torch

    from ldm.devices import default_device, default_dtype
    from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, joined
    from ldm.formats.clip import clip_of
    from ldm.formats.native import build_on_meta, load_strictly
    from ldm.pipeline import Pipeline

    device = default_device()
    pipe, first_stage = None, None
    clip: tuple[CLIP, Tokenizer] | None = None
    for each in found:
        if not each.missing():
            pipe = Pipeline(each.build(default_dtype(device))).to(device, default_dtype(device))
        elif "first_stage" in each.parts:
            part = each.parts["first_stage"]
            first_stage = build_on_meta(part.config.build, part.state, each.source)
            load_strictly(first_stage, part.state, each.source, torch.float32)
            first_stage.to(device).eval()
        elif each.parts.keys() >= {*CLIP_COMPONENTS, OTHERS} and each.tokenizer is not None:
            clip = clip_of(each), each.tokenizer
            load_strictly(clip[0].eval(), joined(each.parts, CLIP_COMPONENTS), each.source)
    return {"pipe": pipe, "first_stage": first_stage if pipe is None else pipe.model.first_stage, "clip": clip}


@dataclass(frozen=True)
class Run:
    """Subject of the measurements, and the folder of their results; networks that have not been trained are None."""

    folder: Path
    pipe: Pipeline | None
    first_stage: FirstStage | None
    clip: tuple[CLIP, Tokenizer] | None
    sets: Mapping[str, Samples]
    split: str
    train_every: int
    settings: Mapping[str, Any]
    further: Mapping[str, Any] = field(default_factory=dict)
    compiled: Mapping[str, Any] | None = None
    """Arguments of ``Pipeline.compile``; :func:`distance` measures the effect of this and of ``further``."""

    def generate(self, captions: Sequence[str], seed: int, settings: Mapping[str, Any]) -> Tensor:
        """Generate an image for each caption, ``[n 3 h w]`` in [-1, 1] on the CPU; image i has the seed ``seed + i``."""
        assert self.pipe is not None
        made = self.pipe(captions, seed=seed, output_type="pt", batch_size=BATCH, progress=False, **settings)
        return made.cpu() * 2 - 1


def good_batches(run: Run, split: str) -> Iterator[Batch]:
    """Yield the batches of a split in order, without its bad samples, of which a warning gives the number."""
    from ldm.data.bad_samples import BAD, summary
    from ldm.data.stream import EvaluationLoader

    reasons: Counter[str] = Counter()
    for batch in EvaluationLoader(run.sets[split], BATCH):
        reasons.update(bad.reason.value for bad in batch.get(BAD, ()))
        yield batch
    if reasons:
        warn(f"{sum(reasons.values())} samples of {split} cannot be used and are left out: {summary(reasons)}.")


def reconstruction(run: Run) -> dict[str, Any]:
    """Measure the mean PSNR in dB over the split, of the decoded mode of the posterior, if there is a first stage.

    Also that of the tiny decoder, if there is one.
    """
    import torch

    from ldm.vae.metrics import psnr

    if run.first_stage is None:
        return {}
    device = run.pipe.device if run.pipe else next(run.first_stage.parameters()).device
    tiny = run.pipe is not None and run.pipe.model.tiny_decoder is not None
    values: dict[str, list[Tensor]] = {"full": [], **({"tiny": []} if tiny else {})}
    with torch.inference_mode():
        for batch in good_batches(run, run.split):
            image = batch["image"].to(device)
            for decoder, measured in values.items():
                measured.append(psnr(image, _reconstructed(run, image, decoder)))
    names = {"full": "psnr", "tiny": "psnr_tiny_decoder"}
    return {names[decoder]: float(torch.cat(measured).mean()) for decoder, measured in values.items()}


def _reconstructed(run: Run, image: Tensor, decoder: str) -> Tensor:
    """Return the decoded modes of the posteriors of images ``[b c h w]`` in [-1, 1]."""
    if run.pipe is not None:
        return run.pipe.model.decode(run.pipe.model.encode(image), decoder)
    from ldm.vae import Tiling

    assert run.first_stage is not None, "reconstruction needs a first stage"
    tiling = Tiling()
    return tiling.decode(run.first_stage, tiling.encode(run.first_stage, image).mode).clamp(-1, 1)


def retrieval(run: Run) -> dict[str, Any]:
    """Measure the recall of the run's CLIP, if it has one, among the images and captions of the split; for test, with val."""
    import torch

    from ldm.clip.retrieval import recall_at_k
    from ldm.data.samples import captions_of

    if run.clip is None:
        return {}
    clip, tokenizer = run.clip
    texts, images = [], []
    with torch.inference_mode():
        for split in (each for each in HELD_OUT if each in run.sets and each in ("val", run.split)):
            for batch in good_batches(run, split):
                texts.append(clip.encode_text(tokenizer(captions_of(batch, "the evaluation of CLIP"))))
                images.append(clip.encode_image(batch["image"]))
    recalls = recall_at_k(torch.cat(texts), torch.cat(images))
    return {"clip": {"pictures": sum(map(len, texts)), **recalls}}


def caption_match(run: Run) -> dict[str, Any]:
    """Measure how often the generated image of a caption looks most like the caption's own image, among those of all splits.

    Only for models whose one condition is the caption. Also writes a sheet of generated images above the true ones, for captions
    of the split at even distances.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from ldm.clip.retrieval import reduce_images, reduced_recall
    from ldm.data.bad_samples import BAD
    from ldm.data.samples import BatchIndices, captions_of

    if run.pipe is None or run.pipe.model.config.conditioner.input_keys != ("text",):
        return {}
    sets, split = run.sets, run.split
    # The reduced images of all splits, the numbers of their samples, and the row at which each split begins.
    reduced_images: list[Tensor] = []
    good: dict[str, np.ndarray] = {}
    for name in sets:
        bad: list[int] = []
        for batch in good_batches(run, name):
            reduced_images.append(reduce_images(batch["image"]))
            bad += [each.index for each in batch.get(BAD, ())]
        good[name] = np.setdiff1d(np.arange(len(sets[name])), bad)
    truths = torch.cat(reduced_images)
    first = dict(zip(sets, np.cumsum([0, *map(len, good.values())]), strict=False))
    results: dict[str, Any] = {"among": len(truths)}
    selected = {
        split: np.arange(len(good[split])),
        f"train[::{run.train_every}]": np.arange(0, len(good["train"]), run.train_every),
    }
    shown = np.linspace(0, len(good[split]) - 1, min(SHOWN, len(good[split]))).astype(int)
    sheet_images, sheet_captions = [], []
    for name, rows in selected.items():
        of, reduced = name.partition("[")[0], []
        for start in tqdm(range(0, len(rows), BATCH), f"generating for {name}", unit="batch", leave=False):
            batch_rows = rows[start : start + BATCH]
            captions = captions_of(
                sets[of].annotations(BatchIndices(good[of][batch_rows])), "the evaluation of generated images"
            )
            made = run.generate(captions, start, {**run.settings, **run.further})
            reduced.append(reduce_images(made))
            if name == split:
                places = shown[(shown >= start) & (shown < start + BATCH)] - start
                sheet_images.append(made[places])
                sheet_captions += [captions[place] for place in places]
        own = torch.from_numpy(rows + first[of])
        results[name] = {"captions": len(rows), **reduced_recall(torch.cat(reduced), truths, own)}
    sheet = side_by_side(
        torch.cat(sheet_images), sets[split][BatchIndices(good[split][shown])]["image"], sheet_captions
    )
    path = run.folder / f"evaluation-{split}.png"
    sheet.save(path)
    print(f"generated images above the true images: {path}")
    return {"samples": results}


def distance(run: Run) -> dict[str, Any]:
    """Measure how far images are from those without further settings and backend, at equal seeds, for the first captions.

    PSNR in dB, the mean over images, and the mean absolute difference in levels of 255.
    """
    from ldm.data.samples import captions_of
    from ldm.vae.metrics import psnr

    changes = {**(run.compiled or {}), **run.further}
    if run.pipe is None or not changes or run.pipe.model.config.conditioner.input_keys != ("text",):
        return {}
    captions = captions_of(next(good_batches(run, run.split)), "the evaluation of generated images")
    changed = run.generate(captions, 0, {**run.settings, **run.further})
    run.pipe.decompile()
    exact = run.generate(captions, 0, run.settings)
    values = {"psnr": float(psnr(exact, changed).mean()), "levels": float((exact - changed).abs().mean()) * 127.5}
    return {"distance": {**changes, "captions": len(captions), **values}}


def side_by_side(made: Tensor, truths: Tensor, captions: Sequence[str]) -> Image:
    """Arrange generated above true images, both ``[n 3 h w]`` in [-1, 1], with a caption under each pair."""
    import torch

    from ldm.image_output import Images

    pairs = (torch.cat([made, truths], dim=2) + 1) / 2
    return Images.of(pairs).grid(columns=COLUMNS, captions=captions)


MEASUREMENTS: tuple[Callable[[Run], dict[str, Any]], ...] = (reconstruction, retrieval, caption_match, distance)
"""Measurements in the order of their results; one that does not apply to a run returns none. The last undoes ``compile``."""


def main() -> None:
    """Run the command."""
    run(app)
