"""Evaluation of a run: ``tools/evaluate.py`` and ``ldm-evaluate``. Only this command reads the test split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.errors import DataError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm.data.samples import Samples
    from ldm.model import LatentDiffusion
    from ldm.pipeline import Pipeline
    from ldm.training.experiment import Experiment

BATCH = 32
SHOWN, COLUMNS = 24, 8
"""Number of samples on the sheet, and in each of its rows."""

HELD_OUT = ("val", "test")

app = new_app()


@app.command()
def evaluate(
    config: Annotated[Path, Option(help="YAML file of the experiment.")],
    split: Annotated[str, Option(help="Split to evaluate: val, or test for final results. Default: val.")] = "val",
    overrides: Annotated[
        list[str] | None, Argument(help="Overrides of the config as key=value, such as run_dir=runs/mine.")
    ] = None,
    model: Annotated[
        str | None, Option(help="Model to evaluate without its CLIP, such as emoji. Default: the model of the run.")
    ] = None,
    train_every: Annotated[
        int, Option(help="Interval N: every N-th training caption is sampled too. Default: 28.")
    ] = 28,
    steps: Annotated[int | None, Option(help="Number of sampling steps. Default: from the model's config.")] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale. Default: from the model's config.")] = None,
    sampler: Annotated[str | None, Option(help="Name of the sampler. Default: from the model's config.")] = None,
    debug: Debug = False,
) -> None:
    """Measure reconstruction, retrieval, and how well samples match their captions."""
    from ldm.pipeline import Pipeline
    from ldm.training.experiment import load_config
    from ldm.training.handoff import result_file

    if split not in HELD_OUT:
        raise DataError(unknown("split", split, HELD_OUT))
    keep_freed_memory()
    experiment = load_config(config, overrides or [])
    out = experiment.folder if model is None else Path()
    pipe = Pipeline.from_pretrained(model or result_file(experiment, "denoiser"))
    sets = {name: experiment.data.open(name) for name in ("train", *HELD_OUT)}  # a sample is compared with all images
    results: dict[str, Any] = {"model": pipe.model.fingerprint, "split": split}
    results |= {"psnr": reconstruction(pipe.model, sets[split])}
    if experiment.clip is not None and model is None:
        results["clip"] = retrieval(experiment, sets, HELD_OUT if split == "test" else (split,))
    if pipe.model.config.conditioner.input_keys == ("text",):
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler}
        results["samples"], sheet = caption_recall(pipe, sets, split, train_every, settings)
        path = out / f"evaluation-{split}.png"
        sheet.save(path)
        print(f"samples above the true images: {path}")
    print(json.dumps(results, indent=2))
    (out / f"evaluation-{split}.json").write_text(json.dumps(results, indent=2) + "\n")


def reconstruction(model: LatentDiffusion, samples: Samples) -> float:
    """Return the mean PSNR in dB over a split of reconstructions from the posterior's mean."""
    import torch

    from ldm.data.stream import EvaluationLoader
    from ldm.vae.metrics import psnr

    values = []
    with torch.inference_mode():
        for batch in EvaluationLoader(samples, BATCH):
            image = batch["image"].to(next(model.parameters()).device)
            values.append(psnr(image, model.decode(model.encode(image))))
    return float(torch.cat(values).mean())


def retrieval(experiment: Experiment, sets: Mapping[str, Samples], splits: tuple[str, ...]) -> dict[str, float]:
    """Return the retrieval recall of the run's CLIP over the images and captions of ``splits`` together."""
    import torch

    from ldm.clip.model import CLIPConfig
    from ldm.clip.retrieval import recall_at_k
    from ldm.data.stream import EvaluationLoader
    from ldm.formats.native import CLIP, load_strictly, read_header
    from ldm.formats.tensors import read_tensors
    from ldm.training.handoff import result_file

    assert experiment.clip is not None
    path = Path(experiment.clip.checkpoint or result_file(experiment, "clip"))
    header = read_header(path, CLIP, CLIPConfig)
    assert header.tokenizer is not None
    clip = header.config.build().eval()
    load_strictly(clip, read_tensors(path), path)
    texts, images = [], []
    with torch.inference_mode():
        for split in splits:
            for batch in EvaluationLoader(sets[split], BATCH):
                texts.append(clip.encode_text(header.tokenizer(batch["text"])))
                images.append(clip.encode_image(batch["image"]))
    return {"pictures": sum(map(len, texts)), **recall_at_k(torch.cat(texts), torch.cat(images))}


def caption_recall(
    pipe: Pipeline, sets: Mapping[str, Samples], split: str, train_every: int, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Image]:
    """Return how often the nearest image to a caption's sample, among the images of all splits, is the caption's own.

    The second result is a sheet of samples above the true images, for evenly spaced captions of ``split``.
    """
    import numpy as np
    import torch

    from ldm.clip.retrieval import sample_recall
    from ldm.data.stream import EvaluationLoader

    # Images of all splits, concatenated; ``first`` is the offset of each split.
    truths = torch.cat([batch["image"] for samples in sets.values() for batch in EvaluationLoader(samples, BATCH)])
    first = dict(zip(sets, np.cumsum([0, *map(len, sets.values())]), strict=False))
    results: dict[str, Any] = {"among": len(truths)}
    rows_by_name = {
        split: np.arange(len(sets[split])),
        f"train[::{train_every}]": np.arange(0, len(sets["train"]), train_every),
    }
    for name, rows in rows_by_name.items():
        of = name.partition("[")[0]
        captions = sets[of].annotations(rows)["text"]
        made = pipe(captions, seed=0, output_type="pt", batch_size=BATCH, **settings).cpu() * 2 - 1
        own = torch.from_numpy(rows + first[of])
        results[name] = {"captions": len(rows), **sample_recall(made, truths, own)}
        if name == split:
            shown = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)
            sheet = side_by_side(made[shown], truths[own[shown]], [captions[i] for i in shown])
    return results, sheet


def side_by_side(made: Tensor, truths: Tensor, captions: Sequence[str]) -> Image:
    """Return a grid of samples above true images, both ``[n 3 h w]`` in [-1, 1], with a caption under each pair."""
    import torch

    from ldm.image_output import Images

    pairs = (torch.cat([made, truths], dim=2) + 1) / 2
    return Images.of(pairs).grid(columns=COLUMNS, captions=captions)


def main() -> None:
    """Run the command."""
    run(app)
