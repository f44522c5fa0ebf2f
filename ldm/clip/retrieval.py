"""Retrieval metrics: recall at k between images and captions, by embedding and by pixel distance of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Number of queries compared at once; bounds the memory."""

DISTANCES = 2**24
"""Largest number of distances between images that are in memory at once."""

ROUNDING = 1e-6
"""Tolerance within which cosines count as equal, since matrix products may round equal rows differently."""


@torch.no_grad()
def recall_at_k(text_features: Tensor, image_features: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Compute the fraction of captions whose own image is among the k nearest by cosine, and vice versa.

    Ties count as errors: an item as near as the own one is ranked before it, so constant embeddings score 0.

    Args:
        text_features, image_features: ``[n d]``; matching rows belong together.
        ks: numbers of nearest items.

    Returns:
        ``text_to_image_R@k`` and ``image_to_text_R@k`` in [0, 1] for each k.
    """
    text, image = F.normalize(text_features.float(), dim=-1), F.normalize(image_features.float(), dim=-1)
    ranks = {"text_to_image": cosine_ranks(text, image), "image_to_text": cosine_ranks(image, text)}
    return {f"{way}_R@{k}": _share_below(rank, k) for way, rank in ranks.items() for k in ks}


def reduce_images(images: Tensor, size: int = 16) -> Tensor:
    """Average ``images [n 3 h w]`` by area to ``size`` x ``size``: ``[n 3*size*size]`` in fp32."""
    return F.interpolate(images.float(), size=(size, size), mode="area").flatten(1)


@torch.no_grad()
def reduced_recall(
    reduced: Tensor, reference: Tensor, own_index: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Compute the fraction of samples for which the true image of their caption is among the k nearest true images.

    By Euclidean distance. True images that equal the own one do not count against a sample, because captions that share an
    image cannot be distinguished by it.

    Args:
        reduced: ``[n d]``, one sample for each caption, from :func:`reduce_images`.
        reference: ``[m d]``, the true images, likewise.
        own_index: ``[n]`` of int, the row of ``reference`` that belongs to each sample.
        ks: numbers of nearest images.

    Returns:
        ``R@k`` in [0, 1] for each k.
    """
    rank = reduced_ranks(reduced, reference, own_index)
    return {f"R@{k}": _share_below(rank, k) for k in ks}


@torch.no_grad()
def reduced_ranks(reduced: Tensor, reference: Tensor, own_index: Tensor) -> Tensor:
    """Count the true images that are nearer to each sample than its own one, ``[n]``; arguments as :func:`reduced_recall`."""
    ranks, chunk = [], max(1, min(CHUNK, DISTANCES // len(reference)))
    for rows, own in zip(reduced.split(chunk), own_index.split(chunk), strict=True):
        # The expansion |a|² - 2ab + |b|² would round equal images apart.
        distance = torch.cdist(rows, reference, compute_mode="donot_use_mm_for_euclid_dist")
        ranks.append((~(distance >= distance.gather(1, own[:, None]))).sum(dim=1))  # NaN counts against
    return torch.cat(ranks)


@torch.no_grad()
def cosine_ranks(queries: Tensor, keys: Tensor, own_index: Tensor | None = None) -> Tensor:
    """Count the keys other than the own one that are at least as near as it, ``[n]``.

    Args:
        queries, keys: ``[n d]`` and ``[m d]`` of unit length.
        own_index: ``[n]`` of int, the row of ``keys`` that belongs to each query; default: the same row.
    """
    ranks, own_index = [], torch.arange(len(queries), device=queries.device) if own_index is None else own_index
    for rows, index in zip(queries.split(CHUNK), own_index.split(CHUNK), strict=True):
        cosine = rows @ keys.T
        own = cosine.gather(1, index[:, None])
        ranks.append((~(cosine < own - ROUNDING)).sum(dim=1) - 1)  # NaN counts against
    return torch.cat(ranks)


def _share_below(rank: Tensor, k: int) -> float:
    return (rank < k).float().mean().item()
