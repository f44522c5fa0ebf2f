"""Summary of an evaluation: its most important numbers, samples for captions of training, the sheet, and what settings cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.clip.retrieval import reduced_recall
from ldm.data.samples import BatchIndices, captions_of
from ldm.evaluation.receipt import Receipt
from ldm.evaluation.subject import READER, Subject
from ldm.image_output import Images
from ldm.vae.metrics import psnr

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 8
"""Number of images in a row of the sheet."""


def samples_of_training(run: Subject) -> dict[str, Any]:
    """Measure the recall by image for every n-th caption of the training set, among the searched images and their own."""
    every = run.interval
    made, true = run.generated(every), run.true("train", every)
    truths, first = run.gallery()
    if "train" in first:
        own = first["train"] + np.searchsorted(run.true("train").rows, true.rows[made.rows])
    else:
        own, truths = len(truths) + made.rows, torch.cat([truths, true.reduced])
    recall = reduced_recall(made.reduced, truths, torch.from_numpy(own))
    return {f"train[::{every}]": {"captions": len(made), **recall}}


def sheet(run: Subject) -> Image:
    """Arrange generated above the true images, for captions of the split at even distances, with the captions."""
    made = run.generated()
    draw = BatchIndices(run.true(run.split).rows[made.places])
    samples = run.sets[run.split]
    return side_by_side(made.shown, samples[draw]["image"], captions_of(samples.annotations(draw), READER))


def side_by_side(made: Tensor, truths: Tensor, captions: Sequence[str]) -> Image:
    """Arrange generated above true images, ``[n 3 h w]`` in [-1, 1], resized to these, with a caption under each pair."""
    if made.shape != truths.shape:
        made = F.interpolate(made, truths.shape[-2:], mode="bicubic", antialias=True)
    pairs = ((torch.cat([made, truths], dim=2) + 1) / 2).clamp(0, 1)
    return Images.of(pairs).grid(columns=COLUMNS, captions=captions)


def distance(run: Subject) -> dict[str, Any]:
    """Measure how far images are from those without further settings and backend, at equal seeds, for the first captions.

    PSNR in dB, the mean over images, and the mean absolute difference in levels of 255; nothing if the sizes differ. The networks
    are not compiled afterwards.
    """
    changes = {**(run.compiled or {}), **run.further}
    if run.pipe is None or not changes or not run.samples_text:
        return {}
    captions = captions_of(next(run.batches(run.split)), READER)
    changed = run.generate(captions, 0, {**run.settings, **run.further})
    run.pipe.decompile()
    exact = run.generate(captions, 0, run.settings)
    if exact.shape != changed.shape:
        return {}
    values = {"psnr": float(psnr(exact, changed).mean()), "levels": float((exact - changed).abs().mean()) * 127.5}
    return {"distance": {**changes, "captions": len(captions), **values}}


def summary(run: Subject, numbers: Sequence[Receipt]) -> dict[str, Any]:
    """Return the most important numbers, and what is measured for the summary alone, as values of JSON.

    It comes after all other measurements, since the networks are not compiled afterwards.

    Args:
        run: the subject.
        numbers: receipts of the subject.
    """
    results: dict[str, Any] = {"model": run.pipe.model.fingerprint if run.pipe else None, "split": run.split}
    results |= {"checkpoints": list(run.notes)} if run.notes else {}
    results |= {name: each.value for name, each in _named("psnr", numbers).items()}
    if retrieval := _named("text_to_image_R@", numbers) | _named("image_to_text_R@", numbers):
        count = max(each.conditions.n for each in retrieval.values())
        results["clip"] = {"images": count} | {name: each.value for name, each in retrieval.items()}
    if recall := _named("recall_by_image@", numbers):
        first = next(iter(recall.values())).conditions
        own = {name.replace("recall_by_image", "R"): each.value for name, each in recall.items()}
        results["samples"] = {"among": first.parameters["among"], run.split: {"captions": first.n} | own}
        results["samples"] |= samples_of_training(run)
    return results | distance(run)


def _named(start: str, numbers: Sequence[Receipt]) -> dict[str, Receipt]:
    return {each.conditions.metric: each for each in numbers if each.conditions.metric.startswith(start)}
