"""Patch dropout: an image tower that sees some of the patches in training (Li et al. 2023, "FLIP", arXiv 2212.00794)."""

from __future__ import annotations

from torch import Tensor

from ldm.nn.token_routing import random_tokens


def drop_patches(patches: Tensor, share: float) -> Tensor:
    """Return a random choice of the patches of each image, in random order: ``[b n d] -> [b m d]``.

    The choice is that of :func:`ldm.nn.token_routing.random_tokens`. The patches hold their positions already.
    """
    kept = random_tokens(patches, share)
    return patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
