"""Text encoder: whether the CLIP recognises which caption belongs to an image."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.diagnosis.association import caption_dependence, clip_of, similarity
from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.statistics import CONSISTENT, SIGNIFICANT


@check(Topic.TEXT, "recognition of captions by the CLIP")
def clip_recognition(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Check that images are more similar to their own captions than to others, in the space of the CLIP.

    It is a fault only if words and thumbnails are related, so that there is something to recognise.
    """
    clip, batch = clip_of(run), run.images("val" if run.validates else "train")
    if clip is None or "text" not in batch:
        return
    compared = similarity(clip, batch)
    text = (
        f"similarity {compared.first:.3f} to own and {compared.second:.3f} to other captions, "
        f"{compared.z:.1f} standard errors apart"
    )
    yield Measured(text)
    if compared.z < CONSISTENT and (words := caption_dependence(batch)) > SIGNIFICANT:
        yield Finding(
            "clip_untrained",
            "the CLIP does not recognise which caption belongs to an image",
            f"{text}, although words and thumbnails are related, by {words:.1f} standard deviations",
            "clip.train.max_steps",
            "train stage clip longer, and check its learning rate and batch size",
        )
