"""Evaluation of a run: ``tools/evaluate.py`` and ``ldm-evaluate``. The only reader of the test split."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.errors import DataError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm.data.samples import Samples
    from ldm.pipeline import Pipeline
    from ldm.training.experiment import Experiment

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
        str | None, Option(help="A model to evaluate instead of the run's, such as emoji; it has no CLIP.")
    ] = None,
    train_every: Annotated[int, Option(help="Also generate images for every n-th training caption.")] = 28,
    steps: Annotated[int | None, Option(help="Steps of the sampler; default: that of the model.")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale; default: that of the model.")] = None,
    sampler: Annotated[str | None, Option(help="Name of the sampler; default: that of the model.")] = None,
    debug: Debug = False,
) -> None:
    """Measure reconstruction, retrieval, and how well generated images match their captions."""
    from ldm.pipeline import Pipeline
    from ldm.training.experiment import load_config
    from ldm.training.handoff import result_file

    if split not in HELD_OUT:
        raise DataError(unknown("split", split, HELD_OUT))
    keep_freed_memory()
    experiment = load_config(config, overrides or [])
    data = experiment.data.without_cache()  # images are read one after the other
    pipe = Pipeline.from_pretrained(model or result_file(experiment, "denoiser"))
    run = Run(
        experiment=experiment if model is None else None,
        folder=experiment.folder if model is None else Path(),
        pipe=pipe,
        sets={  # samples are compared with the images of all splits that there are
            name: data.open(name) for name in ("train", *HELD_OUT) if name == split or data.has(name)
        },
        split=split,
        train_every=train_every,
        settings={"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler},
    )
    results: dict[str, Any] = {"model": pipe.model.fingerprint, "split": split}
    for measure in MEASUREMENTS:
        results |= measure(run)
    print(json.dumps(results, indent=2))
    (run.folder / f"evaluation-{split}.json").write_text(json.dumps(results, indent=2) + "\n")


@dataclass(frozen=True)
class Run:
    """Subject of the measurements; ``experiment`` is None for a model that is not of a run."""

    experiment: Experiment | None
    folder: Path
    pipe: Pipeline
    sets: Mapping[str, Samples]
    split: str
    train_every: int
    settings: Mapping[str, Any]


def reconstruction(run: Run) -> dict[str, Any]:
    """Measure the mean PSNR in dB over the split, of the decoded mode of the posterior."""
    import torch

    from ldm.data.stream import EvaluationLoader
    from ldm.vae.metrics import psnr

    model, values = run.pipe.model, []
    with torch.inference_mode():
        for batch in EvaluationLoader(run.sets[run.split], BATCH):
            image = batch["image"].to(next(model.parameters()).device)
            values.append(psnr(image, model.decode(model.encode(image))))
    return {"psnr": float(torch.cat(values).mean())}


def retrieval(run: Run) -> dict[str, Any]:
    """Measure the recall of the run's CLIP, if it has one, among the images and captions of the split; for test, with val."""
    import torch

    from ldm.clip.model import CLIPConfig
    from ldm.clip.retrieval import recall_at_k
    from ldm.data.samples import captions_of
    from ldm.data.stream import EvaluationLoader
    from ldm.formats.native import CLIP, load_strictly, read_header
    from ldm.formats.tensors import read_tensors
    from ldm.training.handoff import result_file

    if run.experiment is None or run.experiment.clip is None:
        return {}
    path = Path(run.experiment.clip.checkpoint or result_file(run.experiment, "clip"))
    header = read_header(path, CLIP, CLIPConfig)
    assert header.tokenizer is not None
    clip = header.config.build().eval()
    load_strictly(clip, read_tensors(path), path)
    texts, images = [], []
    with torch.inference_mode():
        for split in (each for each in HELD_OUT if each in run.sets and each in ("val", run.split)):
            for batch in EvaluationLoader(run.sets[split], BATCH):
                texts.append(clip.encode_text(header.tokenizer(captions_of(batch, "the evaluation of CLIP"))))
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
    from ldm.data.samples import BatchIndices, captions_of
    from ldm.data.stream import EvaluationLoader

    if run.pipe.model.config.conditioner.input_keys != ("text",):
        return {}
    sets, split = run.sets, run.split
    # The reduced images of all splits, and the row at which each split begins.
    truths = torch.cat(
        [reduce_images(batch["image"]) for samples in sets.values() for batch in EvaluationLoader(samples, BATCH)]
    )
    first = dict(zip(sets, np.cumsum([0, *map(len, sets.values())]), strict=False))
    results: dict[str, Any] = {"among": len(truths)}
    selected = {
        split: np.arange(len(sets[split])),
        f"train[::{run.train_every}]": np.arange(0, len(sets["train"]), run.train_every),
    }
    shown = np.linspace(0, len(sets[split]) - 1, min(SHOWN, len(sets[split]))).astype(int)
    sheet_images, sheet_captions = [], []
    for name, rows in selected.items():
        of, reduced = name.partition("[")[0], []
        for start in tqdm(range(0, len(rows), BATCH), f"generating for {name}", unit="batch", leave=False):
            batch_rows = rows[start : start + BATCH]
            captions = captions_of(sets[of].annotations(batch_rows), "the evaluation of generated images")
            # Image i of a call has the seed seed + i.
            made = run.pipe(captions, seed=start, output_type="pt", batch_size=BATCH, progress=False, **run.settings)
            made = made.cpu() * 2 - 1
            reduced.append(reduce_images(made))
            if name == split:
                places = shown[(shown >= start) & (shown < start + BATCH)] - start
                sheet_images.append(made[places])
                sheet_captions += [captions[place] for place in places]
        own = torch.from_numpy(rows + first[of])
        results[name] = {"captions": len(rows), **reduced_recall(torch.cat(reduced), truths, own)}
    sheet = side_by_side(torch.cat(sheet_images), sets[split][BatchIndices(shown)]["image"], sheet_captions)
    path = run.folder / f"evaluation-{split}.png"
    sheet.save(path)
    print(f"generated images above the true images: {path}")
    return {"samples": results}


def side_by_side(made: Tensor, truths: Tensor, captions: Sequence[str]) -> Image:
    """Arrange generated above true images, both ``[n 3 h w]`` in [-1, 1], with a caption under each pair."""
    import torch

    from ldm.image_output import Images

    pairs = (torch.cat([made, truths], dim=2) + 1) / 2
    return Images.of(pairs).grid(columns=COLUMNS, captions=captions)


MEASUREMENTS: tuple[Callable[[Run], dict[str, Any]], ...] = (reconstruction, retrieval, caption_match)
"""Measurements in the order of their results; one that does not apply to a run returns none."""


def main() -> None:
    """Run the command."""
    run(app)
