"""The CLIP of stage 2: retrieval in both directions, zero-shot classification, and calibration of its logit scale."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.clip.retrieval import cosine_ranks
from ldm.data.samples import captions_of
from ldm.errors import DataError
from ldm.evaluation.intervals import NORMAL_QUANTILE, Estimate, jackknife, wilson
from ldm.evaluation.metric import Number, metric

if TYPE_CHECKING:
    from ldm.clip.model import CLIP
    from ldm.clip.tokenizer import Tokenizer
    from ldm.evaluation.subject import Subject

KS = (1, 5, 10)
"""Numbers of nearest items of the recalls."""

BINS = 15
"""Number of equal bins of the confidence in the calibration error."""

LARGEST_SCALE = 1000.0
"""Largest logit scale that is looked for."""

CHUNK = 1024
"""Number of images compared with all captions at once, which bounds the memory."""

READER = "the evaluation of CLIP"


class Pairs(NamedTuple):
    """Embeddings of the images and captions of the evaluated split, ``[n d]`` each, the captions, and the labels if any."""

    images: Tensor
    texts: Tensor
    captions: list[Any]
    labels: list[int]


@torch.no_grad()
def embeddings(subject: Subject) -> Pairs:
    """Encode the evaluated split with the CLIP of a subject, once."""
    if isinstance(subject.pairs, Pairs):
        return subject.pairs
    assert subject.clip is not None
    clip, tokenizer = subject.clip
    device = next(clip.parameters()).device
    images, texts, captions, labels = [], [], [], []
    for batch in subject.measured():
        own = captions_of(batch, READER)
        images.append(clip.encode_image(batch["image"].to(device)).float().cpu())
        texts.append(clip.encode_text(tokenizer(own).to(device)).float().cpu())
        captions += own
        labels += [int(each) for each in batch.get("label", ())]
    found = Pairs(torch.cat(images), torch.cat(texts), captions, labels)
    subject.pairs = found
    return found


@metric("retrieval", "clip")
def retrieval(subject: Subject) -> Iterator[Number]:
    """Measure how often the own image is among the k nearest to a caption, and vice versa; ties count as errors."""
    if subject.clip is None:
        return
    images, texts, _, _ = embeddings(subject)
    for way, ranks in {
        "text_to_image": cosine_ranks(texts, images),
        "image_to_text": cosine_ranks(images, texts),
    }.items():
        for k in KS:
            share = wilson((ranks < k).numpy())
            yield Number(f"{way}_R@{k}", share, len(images), "higher", parameters={"k": k})


class _WithNormalize:
    """A CLIP as open_clip's functions call it."""

    def __init__(self, clip: CLIP):
        self.clip = clip

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Encode ``tokens [b n] -> [b d]``; the embeddings have unit length in any case."""
        assert normalize
        return self.clip.encode_text(tokens)


def classifier(clip: CLIP, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the classifier ``[d classes]`` of class names in templates with ``{}``, by open_clip's builder, on the CPU.

    The embeddings of a class in all templates are averaged (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
    """
    from open_clip import build_zero_shot_classifier

    weights: Tensor = build_zero_shot_classifier(
        _WithNormalize(clip),
        tokenizer,
        list(classes),
        [partial(_fill, template) for template in templates],
        device=next(clip.parameters()).device,
    )
    return weights.cpu()


def distinct(captions: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Return the distinct captions in order, and the number of that of each image, ``[n]``."""
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    return tuple(numbers), torch.tensor([numbers[each] for each in captions])


def _fill(template: str, name: str) -> str:
    return template.replace("{}", name)


@metric("zero_shot", "clip")
def zero_shot(subject: Subject) -> Iterator[Number]:
    """Measure the accuracy of zero-shot classification; without names of classes, each distinct caption is a class."""
    if subject.clip is None:
        return
    images, _, captions, labels = embeddings(subject)
    names, templates = subject.options.classes, subject.options.templates
    if names:
        if len(labels) != len(images) or not all(0 <= each < len(names) for each in labels):
            raise DataError(
                f"zero-shot classification by {len(names)} class names needs a label below {len(names)} with each image of "
                f"{subject.split}; store labels with the data, or leave the names out."
            )
        target = torch.tensor(labels)
    else:
        names, target = distinct(captions)
    weights = classifier(*subject.clip, names, templates)
    nearest = torch.cat([(rows @ weights).topk(min(5, len(names))).indices for rows in images.split(CHUNK)])
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
    for k in (k for k in (1, 5) if k < len(names)):  # else every image is a hit
        hits = (nearest[:, :k] == target[:, None]).any(1).numpy()
        parameters = {"k": k, "classes": len(names), "names": digest, "templates": list(templates)}
        yield Number(f"zero_shot@{k}", wilson(hits), len(images), "higher", parameters=parameters)


def calibration_error(cosine: Tensor, target: Tensor, scale: float) -> Estimate:
    """Return the expected calibration error of softmax(scale * cosine) over captions (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        cosine: ``[n c]`` of images and distinct captions.
        target: ``[n]``, the caption of each image.
        scale: logit scale.
    """
    parts = [(scale * rows.double()).softmax(dim=1).max(dim=1) for rows in cosine.split(CHUNK)]
    confidence, guess = (torch.cat(each) for each in zip(*parts, strict=True))
    gap = ((guess == target).double() - confidence).numpy()
    bins = np.minimum((confidence.numpy() * BINS).astype(int), BINS - 1)

    def error(index: np.ndarray) -> float:
        return float(np.abs(np.bincount(bins[index], gap[index], BINS)).sum() / len(index))

    return jackknife(len(gap), error).within(0, 1)


def best_scale(cosine: Tensor, target: Tensor) -> Estimate:
    """Return the logit scale at which the captions are most likely, the minimum of the cross entropy of scale * cosine.

    The cross entropy is convex in the scale; its derivative for an image is the mean cosine under the softmax minus that of
    the own caption. The interval is that of an M-estimator (Huber 1967): the deviation of the derivative over the root of n,
    divided by the mean second derivative, which is the variance of the cosine under the softmax.
    """
    own = cosine.gather(1, target[:, None])[:, 0].double()

    def moments(rows: Tensor, scale: float) -> Tensor:
        weight = (scale * rows).softmax(dim=1)
        return torch.stack([(weight * rows).sum(1), (weight * rows.square()).sum(1)])

    def derivatives(scale: float) -> tuple[Tensor, Tensor]:
        mean, square = torch.cat([moments(rows.double(), scale) for rows in cosine.split(CHUNK)], dim=1)
        return mean - own, square - mean.square()

    low, high = 0.0, LARGEST_SCALE
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if float(derivatives(middle)[0].mean()) > 0 else (middle, high)
    first, second = derivatives(low)
    error = (
        float(first.std()) / math.sqrt(len(own)) / float(second.mean().clamp(min=1e-300)) if len(own) > 1 else math.inf
    )
    at_the_end = low > LARGEST_SCALE * (1 - 1e-9) or not math.isfinite(error)
    half = math.inf if at_the_end else NORMAL_QUANTILE * error
    return Estimate(low, low - half, low + half, "M-estimator")


@metric("calibration", "clip")
def calibration(subject: Subject) -> Iterator[Number]:
    """Measure the calibration error of the learned logit scale, and the scale that fits best, relative to the learned one."""
    if subject.clip is None:
        return
    clip, tokenizer = subject.clip
    images, _, captions, _ = embeddings(subject)
    names, target = distinct(captions)
    cosine = images @ classifier(clip, tokenizer, names, ("{}",))
    learned = float(clip.logit_scale.exp())
    parameters = {"bins": BINS, "captions": len(names)}
    yield Number(
        "calibration_error", calibration_error(cosine, target, learned), len(images), "lower", parameters=parameters
    )
    best = best_scale(cosine, target)
    ratio = Estimate(best.value / learned, best.low / learned, best.high / learned, best.method)
    yield Number(
        "logit_scale_ratio", ratio, len(images), "neither", parameters={"captions": len(names), "most": LARGEST_SCALE}
    )
