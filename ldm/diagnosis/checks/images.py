"""Images: range of the pixel values, contrast, and copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ldm.diagnosis.check import Clock, Figure, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun

LEAST = 32
"""Images from which a statement on all of them is made."""

SHOWN = 8


@check(Topic.DATA, "training images")
def images(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Check the examined training images.

    - Values must be in [-1, 1]. Beyond, they are in another range; if nothing among all pixels of many images is below 0, medium
      grey, they are in [0, 1].
    - An image of one color has nothing to learn. The limit of half of the images is where this is the rule and not the exception.
    - Copies: with more than half of the images being copies of another, the model is trained mostly on repetitions, which it
      memorises.
    """
    image = run.images("train")["image"]
    if image.shape[-2:] == (1, 1):  # points of a toy set
        return
    low, high = float(image.min()), float(image.max())
    flat = image.flatten(1)
    constant = float((flat.std(1) < 0.01).float().mean())
    distinct = len(torch.unique(flat, dim=0)) / len(flat)
    yield Measured(
        f"{len(image)} images in [{low:.2f}, {high:.2f}], {distinct:.0%} distinct, {constant:.0%} of one color"
    )
    yield Figure.of("training images", image[:SHOWN], SHOWN)
    if low < -1.01 or high > 1.01:
        yield Finding(
            "images_wrong_range",
            "the images are not in the range [-1, 1]",
            f"their values are from {low:.3g} to {high:.3g}",
            "data",
            "scale them to [-1, 1] where the data set makes its tensors",
        )
    elif constant > 0.5:
        yield Finding(
            "images_constant",
            "the training images have no content",
            f"{constant:.0%} of {len(image)} images have a single color",
            "data.train",
            "prepare the shards again from the original images, and look at them",
        )
    elif low > -0.02 and len(image) >= LEAST:
        yield Finding(
            "images_wrong_range",
            "the images seem to be in the range [0, 1] instead of [-1, 1]",
            f"of {len(image)} images no pixel is darker than medium grey, {low:.2f}",
            "data",
            "scale them to [-1, 1] where the data set makes its tensors",
        )
    if constant <= 0.5 and distinct < 0.5:
        yield Finding(
            "images_duplicated",
            "most training images are copies of others",
            f"only {distinct:.0%} of {len(image)} images are distinct",
            "data.train",
            "remove copies before the shards are prepared",
        )
    if len(run.samples("train")) < 100:
        yield Finding(
            "few_images",
            "there are few training images",
            f"{len(run.samples('train'))}",
            "data.train",
            "expect a model that repeats them, or add images",
            certain=False,
        )
