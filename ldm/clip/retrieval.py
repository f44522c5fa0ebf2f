"""How well images and captions find each other: recall at k, by embedding and by the look of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Rows compared with everything at once; bounds the memory."""

ROUNDING = 1e-6
"""Cosines nearer than this are equal: a matrix product rounds equal rows differently at its edges."""


@torch.no_grad()
def recall_at_k(text_features: Tensor, image_features: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of captions whose own image is among the k nearest by cosine, and of images whose caption is.

    Ties count against: what is as near as the own one is ranked before it, so constant embeddings score 0.

    Args:
        text_features, image_features: ``[n d]``; rows of one number belong together.
        ks: how many nearest ones are looked at.

    Returns:
        ``text_to_image_R@k`` and ``image_to_text_R@k`` in [0, 1] for each k.
    """
    text, image = F.normalize(text_features.float(), dim=-1), F.normalize(image_features.float(), dim=-1)
    ranks = {"text_to_image": _cosine_ranks(text, image), "image_to_text": _cosine_ranks(image, text)}
    return {f"{way}_R@{k}": _share_below(rank, k) for way, rank in ranks.items() for k in ks}


def reduce_images(images: Tensor, size: int = 16) -> Tensor:
    """``images [n 3 h w]`` averaged by area to ``size`` x ``size``: ``[n 3*size*size]`` in fp32."""
    return F.interpolate(images.float(), size=(size, size), mode="area").flatten(1)


@torch.no_grad()
def sample_recall(samples: Tensor, truths: Tensor, own_index: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of samples that look more like the image of their own caption than like (all but k-1) others.

    Both are reduced to 16 x 16 and compared by Euclidean distance. A true image equal to the own one does
    not count against a sample: no look can tell captions apart that share a drawing.

    Args:
        samples: ``[n 3 h w]``, one for each caption.
        truths: ``[m 3 h w]``, the true images, of the same height, width and scale.
        own_index: ``[n]`` of int, the row of ``truths`` that belongs to each sample.
        ks: how many nearest images are looked at.

    Returns:
        ``R@k`` in [0, 1] for each k.
    """
    reduced, reference = reduce_images(samples), reduce_images(truths)
    ranks = []
    for rows, own in zip(reduced.split(CHUNK), own_index.split(CHUNK), strict=True):
        # The expansion |a|² - 2ab + |b|² would round equal images apart.
        distance = torch.cdist(rows, reference, compute_mode="donot_use_mm_for_euclid_dist")
        ranks.append((~(distance >= distance.gather(1, own[:, None]))).sum(dim=1))  # NaN counts against
    rank = torch.cat(ranks)
    return {f"R@{k}": _share_below(rank, k) for k in ks}


def _cosine_ranks(queries: Tensor, keys: Tensor) -> Tensor:
    """How many keys other than the own one are at least as near, ``[n]``; both ``[n d]`` of unit length."""
    ranks = []
    for start in range(0, len(queries), CHUNK):
        cosine = queries[start : start + CHUNK] @ keys.T
        own = cosine.diagonal(offset=start)[:, None]
        ranks.append((~(cosine < own - ROUNDING)).sum(dim=1) - 1)  # NaN counts against
    return torch.cat(ranks)


def _share_below(rank: Tensor, k: int) -> float:
    return (rank < k).float().mean().item()
