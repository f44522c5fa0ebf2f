"""Patch dropout: an image tower that sees some of the patches in training (Li et al. 2023, "FLIP", arXiv 2212.00794)."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_patches(patches: Tensor, share: float) -> Tensor:
    """Return a random choice of the patches of each image, in random order: ``[b n d] -> [b m d]``.

    m is n times 1 - ``share``, rounded, and at least 1. The patches hold their positions already. As those of dropout, the random
    numbers are from torch's default generator, which a training seeds for each batch.
    """
    count = max(1, round(patches.shape[1] * (1 - share)))
    order = torch.rand(patches.shape[:2], device=patches.device).argsort(dim=1)[:, :count]
    return patches.gather(1, order[..., None].expand(-1, -1, patches.shape[2]))
