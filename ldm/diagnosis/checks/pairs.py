"""Pairs: captions, whether there are any, whether they differ, and whether they belong to their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ldm.diagnosis.association import caption_dependence, clip_of, reads_text, similarity
from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.statistics import CONSISTENT

LEAST = 100
"""Pairs from which the absence of a relation is a statement."""


@check(Topic.DATA, "captions and images belong together")
def pairs(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Check that captions differ and describe their images.

    The relation is sought in two ways: by a test of independence between words and thumbnails, which needs no model, and by the
    run's CLIP, which is tested on validation images, since it may have memorised those that it was trained on. Only if neither
    sees any relation, the captions do not belong to the images. If there is no CLIP that could see a relation, that is a
    supposition, because the first test misses subtle ones.

    Captions of which nine in ten are the same say nothing about nine in ten images.
    """
    if not reads_text(run):
        return
    batch = run.images("train")
    if "text" not in batch:
        yield Finding(
            "captions_missing",
            "the training images have no captions",
            "there is no .txt in the shards",
            "data.train",
            "add captions",
        )
        return
    texts: list[str] = batch["text"]
    most, count = Counter(texts).most_common(1)[0]
    if len(texts) > 1 and count > 0.9 * len(texts):
        yield Finding(
            "captions_equal",
            "the captions do not distinguish the images",
            f"{count} of {len(texts)} are {most[:60]!r}",
            "data.train",
            "write captions that say what differs between the images",
        )
        return
    words = caption_dependence(batch)
    clip, split = clip_of(run), "val" if run.validates else "train"
    compared = similarity(clip, run.images(split)) if clip is not None else None
    text = f"dependence of words and thumbnails: {words:.1f} standard deviations"
    if compared is not None:
        text += (
            f"; similarity of own and other captions ({split}): {compared.first:.3f} and {compared.second:.3f}, "
            f"{compared.z:.1f} standard errors apart"
        )
    yield Measured(text)
    if len(texts) >= LEAST and words < CONSISTENT and (compared is None or compared.z < CONSISTENT):
        yield Finding(
            "captions_shuffled",
            "the captions do not belong to their images",
            text,
            "data.train",
            "check how captions were matched to images when the shards were prepared",
            certain=compared is not None,
        )
