"""Reuse of deep features (DeepCache, Ma et al. 2023, arXiv 2312.00858): they change little from one evaluation to the next."""

from __future__ import annotations

from torch import Tensor


class DeepFeatures:
    """Features of the inner blocks of a U-Net, kept over the evaluations of one sampling, which alone may use it.

    Args:
        interval: number of evaluations of the outermost blocks for one of all blocks, which stores the features.
    """

    def __init__(self, interval: int):
        self.interval = interval
        self._features: Tensor | None = None
        self._uses = 0  # of the present features

    def reusable(self, rows: int) -> Tensor | None:
        """Return the features for an evaluation of this number of rows, or None if all blocks must be evaluated."""
        if self._features is None or len(self._features) != rows or self._uses == self.interval:
            return None
        self._uses += 1
        return self._features

    def store(self, features: Tensor) -> None:
        """Keep the features ``[b c h w]`` of an evaluation of all blocks, which is the first of ``interval``."""
        self._features, self._uses = features, 1
