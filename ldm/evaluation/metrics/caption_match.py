"""Agreement of generated images with their captions: CLIP score, and retrieval by embedding and by image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ldm.clip.retrieval import cosine_ranks, reduced_ranks
from ldm.evaluation.intervals import mean_estimate, wilson
from ldm.evaluation.metric import Number, metric
from ldm.evaluation.metrics.contrastive import distinct

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject

KS = (1, 5)
"""Numbers of nearest items of the recalls."""


@metric("clip_score", "samples")
def clip_score(subject: Subject) -> Iterator[Number]:
    """Measure 100 max(cos, 0) between image and caption, the mean over images.

    After Hessel et al. 2021 (arXiv 2104.08718), whose factor is 2.5; torchmetrics has 100, but takes the maximum after the mean.
    The CLIP of a run gives other numbers than OpenAI's.
    """
    if not subject.samples_text:
        return
    networks = subject.feature_networks
    made = subject.generated()
    for network in networks:
        if network.captions is None:
            continue
        text = network.captions(made.captions)
        cosine = F.cosine_similarity(made.features[network.name], text).double().numpy()
        yield Number(
            "clip_score", mean_estimate(100 * cosine.clip(min=0)).within(0, 100), len(made), "higher", network=network
        )


@metric("recall_by_embedding", "samples", numbers=[f"recall_by_embedding@{k}" for k in KS])
def recall_by_embedding(subject: Subject) -> Iterator[Number]:
    """Measure how often the caption of a generated image is among the k nearest of the distinct captions measured, by cosine."""
    if not subject.samples_text:
        return
    networks = subject.feature_networks
    made = subject.generated()
    names, own = distinct(made.captions)
    for network in networks:
        if network.captions is None:
            continue
        text = network.captions(names)
        images = F.normalize(made.features[network.name], dim=-1)
        ranks = cosine_ranks(images, F.normalize(text, dim=-1), own).numpy()
        for k in (each for each in KS if each < len(names)):
            parameters = {"k": k, "captions": len(names)}
            name, share = f"recall_by_embedding@{k}", wilson(ranks < k)
            yield Number(name, share, len(made), "higher", network=network, parameters=parameters)


@metric("recall_by_image", "samples", numbers=[f"recall_by_image@{k}" for k in KS])
def recall_by_image(subject: Subject) -> Iterator[Number]:
    """Measure how often the true image of a caption is among the k nearest to the generated one, at 16 x 16.

    They are searched in all splits, or in the evaluated one if there are more than :data:`ldm.evaluation.subject.GALLERY` images.
    """
    if not subject.samples_text:
        return
    made = subject.generated()
    truths, first = subject.gallery()
    own = torch.from_numpy(made.rows + first[subject.split])
    ranks = reduced_ranks(made.reduced, truths, own).numpy()
    among = "+".join(subject.searched)
    for k in KS:
        parameters = {"k": k, "among": len(truths), "reduced_to": 16}
        yield Number(
            f"recall_by_image@{k}", wilson(ranks < k), len(made), "higher", reference=among, parameters=parameters
        )
