"""Summary of an evaluation: reconstruction, retrieval, how well images match their captions, and what settings cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.clip.retrieval import recall_at_k, reduced_recall
from ldm.data.samples import BatchIndices, captions_of
from ldm.evaluation.opening import HELD_OUT
from ldm.evaluation.subject import READER, Subject
from ldm.image_output import Images
from ldm.vae.metrics import psnr

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 8
"""Number of images in a row of the sheet."""


def reconstruction(run: Subject) -> dict[str, Any]:
    """Measure the mean PSNR in dB over the split, of the decoded mode of the posterior, if there is a first stage.

    Also that of the tiny decoder, if there is one.
    """
    if run.first_stage is None:
        return {}
    tiny = run.pipe is not None and run.pipe.model.tiny_decoder is not None
    names = {"full": "psnr", **({"tiny": "psnr_tiny_decoder"} if tiny else {})}
    return {name: float(run.reconstructions(decoder).values["psnr"].mean()) for decoder, name in names.items()}


def retrieval(run: Subject) -> dict[str, Any]:
    """Measure the recall of the run's CLIP, if it has one, among the images and captions of the split; for test, with val."""
    if run.clip is None:
        return {}
    clip, tokenizer = run.clip
    texts, images = [], []
    with torch.inference_mode():
        for split in (each for each in HELD_OUT if each in run.sets and each in ("val", run.split)):
            for batch in run.batches(split):
                texts.append(clip.encode_text(tokenizer(captions_of(batch, "the evaluation of CLIP"))))
                images.append(clip.encode_image(batch["image"]))
    recalls = recall_at_k(torch.cat(texts), torch.cat(images))
    return {"clip": {"pictures": sum(map(len, texts)), **recalls}}


def caption_match(run: Subject) -> dict[str, Any]:
    """Measure how often the generated image of a caption looks most like the caption's own image, among those of all splits.

    Only for models whose one condition is the caption.
    """
    if not run.samples_text:
        return {}
    truths, first = run.gallery()
    results: dict[str, Any] = {"among": len(truths)}
    for name, of, every in ((run.split, run.split, None), (f"train[::{run.train_every}]", "train", run.train_every)):
        made = run.generated(every)
        own = torch.from_numpy(made.rows + first[of])
        results[name] = {"captions": len(made), **reduced_recall(made.reduced, truths, own)}
    return {"samples": results}


def sheet(run: Subject) -> Image:
    """Arrange generated above the true images, for captions of the split at even distances, with the captions."""
    made = run.generated()
    draw = BatchIndices(run.true(run.split).rows[made.places])
    samples = run.sets[run.split]
    return side_by_side(made.shown, samples[draw]["image"], captions_of(samples.annotations(draw), READER))


def side_by_side(made: Tensor, truths: Tensor, captions: Sequence[str]) -> Image:
    """Arrange generated above true images, both ``[n 3 h w]`` in [-1, 1], with a caption under each pair."""
    pairs = (torch.cat([made, truths], dim=2) + 1) / 2
    return Images.of(pairs).grid(columns=COLUMNS, captions=captions)


def distance(run: Subject) -> dict[str, Any]:
    """Measure how far images are from those without further settings and backend, at equal seeds, for the first captions.

    PSNR in dB, the mean over images, and the mean absolute difference in levels of 255. The networks are not compiled afterwards.
    """
    changes = {**(run.compiled or {}), **run.further}
    if run.pipe is None or not changes or not run.samples_text:
        return {}
    captions = captions_of(next(run.batches(run.split)), READER)
    changed = run.generate(captions, 0, {**run.settings, **run.further})
    run.pipe.decompile()
    exact = run.generate(captions, 0, run.settings)
    values = {"psnr": float(psnr(exact, changed).mean()), "levels": float((exact - changed).abs().mean()) * 127.5}
    return {"distance": {**changes, "captions": len(captions), **values}}


MEASUREMENTS: tuple[Callable[[Subject], dict[str, Any]], ...] = (reconstruction, retrieval, caption_match, distance)
"""Measurements in the order of their results; one that does not apply to a run returns none. The last undoes ``compile``."""


def summary(run: Subject) -> dict[str, Any]:
    """Return the results of all measurements, as values of JSON."""
    results: dict[str, Any] = {"model": run.pipe.model.fingerprint if run.pipe else None, "split": run.split}
    results |= {"checkpoints": list(run.notes)} if run.notes else {}
    for measure in MEASUREMENTS:
        results |= measure(run)
    return results
